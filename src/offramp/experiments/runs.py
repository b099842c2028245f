"""Training runs side by side in worker processes, each kept in a folder of its own.

A run's folder appears only when it is whole (``run.json`` and the traces of its best and last
parameters on the validation text), so a study that was stopped does only what is missing.
"""

import math
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch import Tensor

from offramp.data import Corpus, batches, character_tokenizer, count_unknown, encode
from offramp.errors import CorpusError
from offramp.evaluation.trace import ExitTrace, collect_trace
from offramp.models.checkpoint import read_json, write_json
from offramp.models.transformer import DecoderConfig
from offramp.training import Progress, TrainConfig, Validation, new_model, train


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model to train. ``model.vocab_size`` is set from the corpus."""

    name: str
    "Its folder."
    corpus: Corpus
    model: DecoderConfig
    training: TrainConfig
    device: str = "cpu"


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


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run left in its folder."""

    about: dict[str, Any]
    best: ExitTrace
    last: ExitTrace


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

    Figures do not depend on ``jobs``. On KeyboardInterrupt the runs under way are dropped,
    those that are done stay, and the interrupt goes on to the caller.
    """
    missing = [run for run in runs if not (folder / run.name / "run.json").exists()]
    for run in runs:
        if run not in missing:
            on_done(run.name)
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
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
        except BaseException:
            stop.set()
            workers.shutdown(wait=True, cancel_futures=True)
            raise


def load_run(folder: Path) -> RunResult:
    """Read what ``run_all`` left in a run's folder."""
    return RunResult(
        about=read_json(folder / "run.json"),
        best=ExitTrace.load(folder / "best.npz"),
        last=ExitTrace.load(folder / "last.npz"),
    )


class _StoppedError(Exception):
    """The study was interrupted while this run trained."""


_stop: Event
_reports: "Queue[RunProgress]"


def _start_worker(threads: int, stop: Event, reports: "Queue[RunProgress]") -> None:
    global _stop, _reports
    _stop, _reports = stop, reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    torch.set_num_threads(threads)


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
    """Train one model and leave its folder, whole."""
    tokenizer = character_tokenizer(run.corpus.train)
    train_ids = encode(tokenizer, run.corpus.train)
    window, batch = run.training.seq_len, run.training.batch_size
    validation_ids = encode(tokenizer, run.corpus.validation)
    whole = (len(validation_ids) - 1) // (window * batch) * window * batch
    if whole < 1:
        raise CorpusError(
            f"{run.corpus.name}: expected at least {window * batch + 1} validation characters, "
            f"got {len(validation_ids)}"
        )
    validation_ids = validation_ids[: whole + 1]  # whole batches only: the seed's protocol
    config = replace(run.model, vocab_size=tokenizer.get_vocab_size())
    model = new_model(config, seed=run.training.seed).to(run.device)

    def on_step(progress: Progress) -> None:
        if progress.step % 8 == 0:
            _reports.put(_report(run.name, progress))

    best_state: dict[str, Tensor] = {}

    def on_validation(validation: Validation) -> None:
        if validation.is_best:
            best_state.update({name: value.clone() for name, value in model.state_dict().items()})

    result = train(
        model,
        train_ids,
        validation_ids,
        run.training,
        on_step=on_step,
        on_validation=on_validation,
        should_stop=_stop.is_set,
    )
    if _stop.is_set():
        raise _StoppedError(run.name)
    aside = folder / f".{run.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    layers = range(1, model.num_layers + 1)
    windows = list(batches(validation_ids, seq_len=window, batch_size=batch))
    collect_trace(model, windows, layers=layers).save(aside / "last.npz")
    model.load_state_dict(best_state)
    collect_trace(model, windows, layers=layers).save(aside / "best.npz")
    about = {
        "name": run.name,
        "corpus": {"name": run.corpus.name, "sha256": run.corpus.sha256},
        "model": asdict(config),
        "training": asdict(run.training),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_tokens": len(train_ids),
        "validation_tokens": len(validation_ids),
        "unknown_tokens": count_unknown(tokenizer, validation_ids),
        "validations": [asdict(validation) for validation in result.validations],
    }
    write_json(aside / "run.json", about)
    aside.rename(folder / run.name)
