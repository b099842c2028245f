"""Training runs side by side in worker processes, each kept in a folder of its own.

A run's folder appears only when it is whole, so a study that was stopped does only what is
missing. What a run does and leaves in its folder is its own business (``Run.work``).
"""

import glob
import math
import multiprocessing
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty
from typing import Protocol, TypeVar

import psutil
import torch

from offramp.errors import TrainingError
from offramp.training.loop import Progress


class Run(Protocol):
    """One run; it travels to a worker process as a pickle."""

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
        """Do it, and leave everything in ``folder``, which is there and empty.

        Returns whether it is whole. Where ``should_stop`` says yes, it may return False soon:
        the folder is then dropped.
        """


R = TypeVar("R", bound=Run)


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """What a worker says while it trains."""

    name: str
    step: int
    total_steps: int
    loss: float
    "Weighted training loss, nats."
    ppl: float
    "Training PPL of the deepest weighted layer."


def run_all(
    runs: Sequence[Run],
    folder: Path,
    *,
    jobs: int,
    threads: int,
    on_progress: Callable[[RunProgress], None],
    on_done: Callable[[str], None],
) -> None:
    """Do the runs that have no folder yet, ``jobs`` at a time with ``threads`` each.

    Figures do not depend on ``jobs``. On KeyboardInterrupt the runs that still train are dropped,
    those that are done stay, and the interrupt goes on to the caller. A TrainingError where a
    worker was killed.
    """
    missing = missing_of(runs, folder, on_done)
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    stop, reports = context.Event(), context.Queue()
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
                "runs: expected every process to end its run, and one was killed; for want of "
                "memory? The same command goes on, and fewer jobs need less"
            ) from None
        except BaseException:
            stop.set()
            workers.shutdown(wait=True, cancel_futures=True)
            raise


def missing_of(runs: Sequence[R], folder: Path, on_done: Callable[[str], None]) -> list[R]:
    """The runs that have no folder in ``folder``, which is made; the others are done."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """A parent that is killed says nothing; whoever starts it anew must not meet its workers."""
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
    """Do a run and leave its folder, whole."""
    aside = aside_of(folder, run.name)

    def on_step(progress: Progress) -> None:
        if progress.step % 8 == 0:
            _reports.put(_report(run.name, progress))

    if not run.work(aside, on_step=on_step, should_stop=_stop.is_set):
        raise _StoppedError(run.name)
    put_in_place(aside, folder / run.name)


def aside_of(folder: Path, name: str) -> Path:
    """An empty folder beside a run's, this process's own.

    Those of this machine's dead processes are removed; other machines may share ``folder``.
    """
    here = f".{name}.{socket.gethostname()}"
    for left in folder.glob(f"{glob.escape(here)}.*.tmp"):
        if not psutil.pid_exists(int(left.name.rsplit(".", 2)[1])):
            shutil.rmtree(left, ignore_errors=True)
    aside = folder / f"{here}.{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    return aside


def put_in_place(aside: Path, target: Path) -> None:
    """A run is whole; where another process was first, its run is the same and stays."""
    try:
        aside.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(aside)
