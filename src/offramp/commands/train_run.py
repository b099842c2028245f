"""A training run as a value, in its folder and in figures."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offramp.errors import CheckpointError
from offramp.exits.weightings import parse_loss_weights
from offramp.exits.weights import RECOMMENDED
from offramp.files import count_parameters, parsing, read_json
from offramp.models.model_files import FINISHED, UNFINISHED
from offramp.models.native.config import DecoderConfig
from offramp.training.checkpoint import Checkpoints
from offramp.training.config import TrackerName, TrainConfig
from offramp.training.loop import Progress, TrainResult
from offramp.training.validation import Validation, stale, stored_validation


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """A whole training run as a value."""

    corpus: str
    tokenizer: str = "characters"
    model: DecoderConfig
    training: TrainConfig
    tracker: TrackerName = "none"


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


def stored_run_file(out: Path, steps: int | None) -> dict[str, Any]:
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
    if steps is not None:
        kept = Checkpoints(folder=out / "checkpoints").paths()
        done = int(kept[-1].name.removeprefix("step-")) if kept else 0
        if steps <= done or not kept:
            if not kept:
                raise CheckpointError(f"{out}: expected a checkpoint to continue from, found none")
            raise CheckpointError(
                f"steps: expected more than the {done} steps that the run has, got {steps}"
            )
    described = unfinished if unfinished.exists() else finished
    stored = read_json(described)
    if not isinstance(stored, dict) or not {"run", "corpus_sha256"} <= set(stored):
        raise CheckpointError(f"{out}: expected the description of a run in {UNFINISHED}")
    with parsing(described, "the description of a run"):
        training = stored_run(stored["run"]).training
    if steps is not None and training.steps is not None and steps < training.steps:
        raise CheckpointError(
            f"steps: expected at least the run's own {training.steps}, got {steps}"
        )
    if steps is not None and _ran_out_of_patience(kept[-1], training):
        raise CheckpointError(
            f"{out}: expected a run that ended at its last step, but this one was stopped by "
            f"--patience at step {done}; it would take no further step"
        )
    return stored


def _ran_out_of_patience(checkpoint: Path, training: TrainConfig) -> bool:
    path = checkpoint / "state.json"
    state = read_json(path)
    with parsing(path, "the state of a run"):
        return stale([stored_validation(each) for each in state["validations"]], training)


def stored_run(stored: dict[str, Any]) -> TrainRun:
    """A run as ``asdict`` and JSON left it: infinity is a word, tuples are lists."""
    training = dict(stored["training"])
    if isinstance(training["select_at"], str):
        training["select_at"] = float(training["select_at"])
    training["alpha_steps"] = tuple(training["alpha_steps"])
    model = {**stored["model"], "exit_layers": tuple(stored["model"]["exit_layers"])}
    return TrainRun(
        corpus=stored["corpus"],
        tokenizer=stored["tokenizer"],
        model=DecoderConfig(**model),
        training=TrainConfig(**training),
        tracker=stored.get("tracker", "none"),
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
