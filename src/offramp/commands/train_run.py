"""A training run as a value, in its folder and in figures."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from offramp.errors import CheckpointError
from offramp.exits.weightings import parse_loss_weights
from offramp.exits.weights import RECOMMENDED
from offramp.files import count_parameters, file_sha256
from offramp.models.model_files import FINISHED, UNFINISHED
from offramp.models.native.config import DecoderConfig
from offramp.reading import read_as, read_json
from offramp.training.checkpoint import Checkpoints, read_state
from offramp.training.config import TrackerName, TrainConfig
from offramp.training.loop import Progress, TrainResult
from offramp.training.validation import Validation, stale


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """A whole training run as a value."""

    corpus: str
    tokenizer: str = "characters"
    model: DecoderConfig
    training: TrainConfig
    tracker: TrackerName = "none"


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """The description of a run in its folder, from which it continues."""

    run: TrainRun
    corpus_sha256: str
    tokenizer_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Watcher:
    """Functions that are called during a run; see ``training.loop.train``."""

    on_step: Callable[[Progress], None] = lambda progress: None
    on_validation: Callable[[Validation], None] = lambda validation: None
    on_damaged: Callable[[str], None] = lambda sentence: None
    should_stop: Callable[[], bool] = lambda: False


NOBODY = Watcher()


def resolve(run: TrainRun) -> TrainRun:
    """Give ``recommended`` its exit layer and its threshold; check the loss weights."""
    model, training = run.model, run.training
    if training.loss_weights == "recommended":
        model = replace(model, exit_layers=(RECOMMENDED.exit_layer, *model.exit_layers))
        if training.select_at is None:
            training = replace(training, select_at=RECOMMENDED.threshold)
    parse_loss_weights(
        training.loss_weights, num_layers=model.num_hidden_layers, exit_layers=model.exit_layers
    )
    return replace(run, model=model, training=training)


def stored_run_file(out: Path, steps: int | None) -> StoredRun:
    """Read the description of the run that is to continue from its folder."""
    if not out.is_dir():
        raise CheckpointError(f"{out}: expected the folder of an unfinished run, found none")
    unfinished, finished = out / UNFINISHED, out / FINISHED
    if not unfinished.exists() and not (finished.exists() and steps is not None):
        if (out / "config.json").exists():
            more = "; --steps N extends it" if finished.exists() else ""
            found = f"the run there is finished{more}"
        else:
            found = "found none"
        raise CheckpointError(f"{out}: expected an unfinished run to continue, but {found}")
    stored = read_as(StoredRun, unfinished if unfinished.exists() else finished)
    if steps is not None and not (unfinished.exists() and steps == stored.run.training.steps):
        _check_extension(out, steps, stored.run.training)
    return stored


def check_tokenizer(path: Path, stored: StoredRun) -> None:
    """Raise a CheckpointError for another tokenizer than the run's; a missing one is reported."""
    if stored.tokenizer_sha256 is None or not path.is_file():
        return
    if (found := file_sha256(path)) != stored.tokenizer_sha256:
        raise CheckpointError(
            f"{path}: expected the tokenizer that the run began with, sha256 "
            f"{stored.tokenizer_sha256}, got {found}"
        )


def _check_extension(out: Path, steps: int, training: TrainConfig) -> None:
    """Raise a CheckpointError unless a run can continue to that many steps."""
    kept = Checkpoints(folder=out / "checkpoints").paths()
    if not kept:
        raise CheckpointError(f"{out}: expected a checkpoint to continue from, found none")
    done = int(kept[-1].name.removeprefix("step-"))
    if steps <= done:
        raise CheckpointError(
            f"steps: expected more than the {done} steps that the run has, got {steps}"
        )
    if training.steps is not None and steps < training.steps:
        raise CheckpointError(
            f"steps: expected at least the run's own {training.steps}, got {steps}"
        )
    if stale(read_state(kept[-1]).validations, training):
        raise CheckpointError(
            f"{out}: expected a run that ended at its last step, but this one was stopped by "
            f"--patience at step {done}; it would take no further step"
        )


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A finished run in figures."""

    parameters: int
    tokens: int
    "Training tokens read, those of all epochs counted."
    best: Validation


def run_summary(out: Path, result: TrainResult) -> RunSummary:
    """Read what a finished run left in its folder."""
    training = read_json(out / "config.json")["training"]
    return RunSummary(
        parameters=count_parameters(out / "model.safetensors"),
        tokens=result.step * training["batch_size"] * training["seq_len"],
        best=result.best,
    )
