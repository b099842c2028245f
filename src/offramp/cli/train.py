"""offramp train."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from offramp.cli.base import Device, Threads, console, say, stop_on_signals, use
from offramp.errors import ConfigError
from offramp.models.native.config import DecoderConfig
from offramp.training.config import TrackerName, TrainConfig

if TYPE_CHECKING:
    from offramp.commands.train_run import Watcher
    from offramp.report.progress import Bars
    from offramp.training.loop import TrainResult


def train(
    *,
    corpus: str | None = None,
    out: Path | None = None,
    tokenizer: str | None = None,
    resume: Path | None = None,
    config: Path | None = None,
    tracker: TrackerName | None = None,
    model: Annotated[DecoderConfig | None, Parameter(name="*")] = None,
    training: Annotated[TrainConfig | None, Parameter(name="*")] = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Train a native decoder with exits on a corpus; --corpus and --out, or --resume.

    Parameters
    ----------
    corpus
        pangram, python-docs, hf:DATASET, or a UTF-8 text file or a folder of them.
    out
        Folder for the model: the best by validation, and the last in last/.
    tokenizer
        characters (default), bytes, bpe:N, or a Hugging Face tokenizer.
    resume
        Continue the unfinished run in this folder; it needs no other flag. With --steps a
        finished run is extended to this number of steps.
    config
        Take flags from this TOML or JSON file; those on the command line win.
    tracker
        Where to log: tensorboard (default; in OUT/logs), wandb or none.
    """
    steps = training.steps if training and training == TrainConfig(steps=training.steps) else None
    others = (corpus, out, tokenizer, model, config, tracker, training if steps is None else None)
    folder = _folder(resume, out, given=set(others) != {None}, corpus=corpus)

    from offramp.commands.train import resume_run, start_run
    from offramp.commands.train_run import TrainRun
    from offramp.report.progress import bars
    from offramp.training.distributed import local_device

    device = local_device(device)
    use(device, threads)
    with bars(console) as drawn, stop_on_signals() as stopped:
        common: dict[str, Any] = {"device": device, "watcher": _watcher(drawn, stopped)}
        if corpus is None:
            result = resume_run(folder, steps=steps, **common)
        else:
            run = TrainRun(
                corpus=corpus,
                tokenizer=tokenizer or "characters",
                model=model or DecoderConfig(),
                training=training or TrainConfig(),
                tracker=tracker or "tensorboard",
            )
            result = start_run(run, folder, **common)
    if not result.finished:
        resume_with = f"Resume with: offramp train --resume {quote(str(folder))}"
        say(f"Stopped. Checkpoint saved at step {result.step}. {resume_with}")
        sys.exit(128 + (stopped() or signal.SIGINT))
    _say_summary(folder, result)


def _folder(resume: Path | None, out: Path | None, *, given: bool, corpus: str | None) -> Path:
    """The folder of the run; refuses flags of a new run with --resume, and too few for one."""
    if resume and given:
        raise ConfigError("resume: expected no other flag but --steps, since the run keeps its own")
    if resume:
        return resume
    if out is None or corpus is None:
        missing = " and ".join(
            name for name, value in (("--corpus", corpus), ("--out", out)) if value is None
        )
        raise ConfigError(f"train: expected --corpus and --out, or --resume; {missing} is missing")
    return out


def _say_summary(folder: Path, result: "TrainResult") -> None:
    """What was trained, how good it is, where it is, and what to type next."""
    from offramp.commands.train import METRICS
    from offramp.commands.train_run import run_summary

    summary = run_summary(folder, result)
    best = "  ".join(f"{layer}: {ppl:.3f}" for layer, ppl in summary.best.exit_ppl.items())
    say(f"{summary.parameters:,} parameters, trained on {summary.tokens:,} tokens")
    say(f"best validation PPL by layer  {best}  (step {summary.best.step})")
    say(
        f"{quote(str(folder))} holds the best parameters, {quote(str(folder / 'last'))} those of "
        f"step {result.step}, {quote(str(folder / METRICS))} the figures of each step."
    )
    say(f"Next: offramp sweep {quote(str(folder))} --corpus OTHER_TEXT")


def _watcher(drawn: "Bars", stopped: Callable[[], int | None]) -> "Watcher":
    """What draws a run's progress, and stops it after a signal."""
    from offramp.commands.train_run import Watcher
    from offramp.training.loop import Progress
    from offramp.training.validation import Validation

    def on_step(progress: Progress) -> None:
        if progress.step % 10 == 0 or progress.step == progress.total_steps:
            ppl = progress.losses[max(progress.losses)].exp()
            text = f"loss {progress.loss:.3f}  PPL {ppl:.2f}"
            drawn.show("train", done=progress.step, total=progress.total_steps, text=text)

    def on_validation(validation: Validation) -> None:
        exits = "  ".join(f"{layer}: {ppl:.3f}" for layer, ppl in validation.exit_ppl.items())
        best = "  (best)" if validation.is_best else ""
        say(f"step {validation.step}  validation PPL by layer  {exits}{best}")

    return Watcher(
        on_step=on_step,
        on_validation=on_validation,
        on_damaged=say,
        should_stop=lambda: stopped() is not None,
    )
