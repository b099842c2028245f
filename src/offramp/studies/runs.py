"""Training runs side by side in worker processes, each kept in a folder of its own.

A run's folder appears only when it is complete, so a study that was stopped does only the runs
that are missing. ``Run.work`` says what a run does and writes to its folder.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty
from typing import Protocol, TypeVar

import torch

from offramp.errors import CheckpointError, TrainingError
from offramp.files import reason, sync, temporary_folder, writing
from offramp.folders import sync_tree
from offramp.training.loop import Progress


class Run(Protocol):
    """One run; it is pickled to reach its worker process."""

    @property
    def name(self) -> str:
        """The name of its folder."""

    def work(
        self,
        folder: Path,
        *,
        on_step: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> bool:
        """Do the run and write its results to ``folder``, which exists and is empty.

        Returns whether the run is complete. When ``should_stop`` returns True, the run may stop
        early and return False; its folder is then removed.
        """


R = TypeVar("R", bound=Run)


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """How far a run is, as its worker reports it."""

    name: str
    step: int
    total_steps: int
    loss: float
    "Weighted training loss in nats."
    ppl: float
    "Training PPL of the deepest weighted layer."


def default_jobs(threads: int = 1) -> int:
    """Number of processes of this many threads for the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every platform
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // threads)


def run_all(
    runs: Sequence[Run],
    folder: Path,
    *,
    jobs: int,
    threads: int,
    on_progress: Callable[[RunProgress], None],
    on_done: Callable[[str], None],
) -> None:
    """Do the runs that have no folder yet, ``jobs`` at a time with ``threads`` threads each.

    Figures do not depend on ``jobs``. On KeyboardInterrupt the runs in progress are dropped, the
    finished ones are kept, and the interrupt is raised again. Raises TrainingError where a worker
    was killed.
    """
    missing = missing_of(runs, folder, on_done)
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    try:
        stop, reports = context.Event(), context.Queue()
    except (OSError, ImportError) as error:
        raise TrainingError(
            "runs: expected shared memory for worker processes, which is /dev/shm on Linux, got: "
            f"{reason(error)}"
        ) from None
    workers = ProcessPoolExecutor(
        min(jobs, len(missing)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(threads, stop, reports),
    )
    with workers:
        pending = {workers.submit(_work, run, folder): run for run in missing}
        try:
            while pending:
                done, _ = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                for report in _drain(reports):
                    on_progress(report)
                for future in done:
                    future.result()
                    on_done(pending.pop(future).name)
        except BrokenProcessPool:
            raise TrainingError(
                "runs: expected every process to end its run, but one was killed, perhaps because "
                "memory ran out; the same command continues, and fewer jobs need less memory"
            ) from None
        except BaseException:
            stop.set()
            workers.shutdown(wait=True, cancel_futures=True)
            raise


def missing_of(runs: Sequence[R], folder: Path, on_done: Callable[[str], None]) -> list[R]:
    """The runs without a folder in ``folder``, which is created; ``on_done`` gets the others."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for run in runs:
        if (folder / run.name).exists():
            on_done(run.name)
        else:
            missing.append(run)
    return missing


class _StoppedError(RuntimeError):
    """The study was interrupted while this run trained."""


_stop: Event
_reports: "Queue[RunProgress]"


def _start_worker(threads: int, stop: Event, reports: "Queue[RunProgress]") -> None:
    global _stop, _reports
    _stop, _reports = stop, reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells workers to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End this process when its parent ends, so that no worker outlives a killed study."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _drain(reports: "Queue[RunProgress]") -> Iterable[RunProgress]:
    while True:
        try:
            yield reports.get_nowait()
        except Empty:
            return


def _report(name: str, progress: Progress) -> RunProgress:
    deepest = float(progress.losses[max(progress.losses)])
    return RunProgress(
        name=name,
        step=progress.step,
        total_steps=progress.total_steps,
        loss=float(progress.loss),
        ppl=math.exp(deepest),
    )


def _work(run: Run, folder: Path) -> None:
    """Do a run and put its complete folder in place; nothing is left of one that fails.

    Another command that shares the folder may have done it since this one began.
    """
    if (folder / run.name).exists():
        return

    def on_step(progress: Progress) -> None:
        if progress.step % 8 == 0:
            _reports.put(_report(run.name, progress))

    with new_run(folder, run.name) as aside:
        if not run.work(aside, on_step=on_step, should_stop=_stop.is_set):
            raise _StoppedError(run.name)


@contextmanager
def new_run(folder: Path, name: str) -> Iterator[Path]:
    """Yield an empty temporary folder for a run of this process, beside the run's final one.

    On success it is synced and renamed; if another process was first, its equal run is kept.
    Temporary folders of this machine's dead processes are removed; other machines may share
    ``folder``. Raises CheckpointError if the run cannot be written.
    """
    target = folder / name
    with writing(target), temporary_folder(target) as aside:
        yield aside
        sync_tree(aside)
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        sync(folder)


@contextmanager
def reading_run(folder: Path) -> Iterator[None]:
    """Say in the error of a damaged run how to do it anew."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; remove the folder {folder}, and the same command does this run anew"
        ) from None
