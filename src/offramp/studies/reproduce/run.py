"""One training run of the reproduction, and the files that it leaves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from offramp.data import (
    Corpus,
    batches,
    character_tokenizer,
    count_unknown,
    encode,
    vocabulary_size,
)
from offramp.errors import CheckpointError, CorpusError
from offramp.evaluation.trace import ExitTrace, collect_trace
from offramp.files import write_json
from offramp.models.native.config import DecoderConfig
from offramp.reading import read_json, value_of
from offramp.studies.runs import reading_run
from offramp.training.config import TrainConfig
from offramp.training.loop import Progress, new_model, train
from offramp.training.validation import Validation


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """One model to train. ``model.vocab_size`` is set from the corpus."""

    name: str
    "Name of its folder."
    corpus: Corpus
    model: DecoderConfig
    training: TrainConfig
    device: str = "cpu"

    def work(
        self,
        folder: Path,
        *,
        on_step: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> bool:
        """Train; write ``run.json`` and the traces of the best and the last parameters."""
        tokenizer = character_tokenizer(self.corpus.train)
        train_ids = encode(tokenizer, self.corpus.train)
        window, batch = self.training.seq_len, self.training.batch_size
        validation_ids = encode(tokenizer, self.corpus.validation)
        whole = (len(validation_ids) - 1) // (window * batch) * window * batch
        if whole < 1:
            raise CorpusError(
                f"{self.corpus.name}: expected at least {window * batch + 1} validation "
                f"characters, got {len(validation_ids)}"
            )
        validation_ids = validation_ids[: whole + 1]  # whole batches only: the seed's protocol
        config = replace(self.model, vocab_size=vocabulary_size(tokenizer))
        model = new_model(config, seed=self.training.seed).to(self.device)

        best_state: dict[str, Tensor] = {}

        def on_validation(validation: Validation) -> None:
            if validation.is_best:
                best_state.update(
                    {name: value.clone() for name, value in model.state_dict().items()}
                )

        result = train(
            model,
            train_ids,
            validation_ids,
            self.training,
            on_step=on_step,
            on_validation=on_validation,
            should_stop=should_stop,
        )
        if not result.finished:
            return False
        layers = range(1, model.num_layers + 1)
        windows = list(batches(validation_ids, seq_len=window, batch_size=batch))
        collect_trace(model, windows, layers=layers).save(folder / "last.npz")
        model.load_state_dict(best_state)
        collect_trace(model, windows, layers=layers).save(folder / "best.npz")
        about = {
            "name": self.name,
            "corpus": {"name": self.corpus.name, "sha256": self.corpus.sha256},
            "model": config.stored(),
            "training": asdict(self.training),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "train_tokens": len(train_ids),
            "validation_tokens": len(validation_ids),
            "unknown_tokens": count_unknown(tokenizer, validation_ids),
            "validations": [asdict(validation) for validation in result.validations],
        }
        write_json(folder / "run.json", about)
        return True


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The files that a run left in its folder."""

    about: dict[str, Any]
    best: ExitTrace
    last: ExitTrace


def load_run(folder: Path) -> RunResult:
    """Read the files that ``SeedRun.work`` wrote."""
    with reading_run(folder):
        return RunResult(
            about=_about(folder / "run.json"),
            best=ExitTrace.load(folder / "best.npz"),
            last=ExitTrace.load(folder / "last.npz"),
        )


@dataclass(frozen=True, kw_only=True)
class _About:
    """The content of a run's ``run.json``."""

    name: str
    corpus: Mapping[str, str]
    model: DecoderConfig
    training: TrainConfig
    parameters: int
    train_tokens: int
    validation_tokens: int
    unknown_tokens: int
    validations: tuple[Validation, ...]


def check_kept(runs: Sequence[SeedRun], folder: Path) -> int:
    """Return how many of the runs are in ``folder`` already.

    Raises CheckpointError if what is there is not the run: another text, model or training.
    """
    there = [run for run in runs if (folder / run.name).exists()]
    for run in there:
        path = folder / run.name / "run.json"
        with reading_run(path.parent):
            about: _About = value_of(_About, read_json(path), path)
        mine = replace(run.model, vocab_size=about.model.vocab_size)
        found = (about.corpus.get("sha256"), about.model, about.training)
        if found != (run.corpus.sha256, mine, run.training):
            raise CheckpointError(
                f"{path}: expected the run {run.name} on {run.corpus.name} with the same text, "
                "model and training, got another; choose another folder"
            )
    return len(there)


def _about(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path)
    value_of(_About, content, path)
    return content
