"""One training run of a study."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from offramp.calibration.specialise import specialise_exits, with_own_heads
from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.data import batches, encode, make_tokenizer, vocabulary_size
from offramp.data.text import Text
from offramp.data.tokenizer import save_tokenizer
from offramp.environment import environment
from offramp.errors import CorpusError
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.files import file_sha256, stored_fields
from offramp.models.fitted import save_fitted
from offramp.models.missing_kv import EXACT, are_complete
from offramp.models.native.checkpoint import save_checkpoint
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.studies.study.evaluate import Evaluation, evaluate
from offramp.studies.study.format import FORMAT, FORMAT_FIELDS, nested_records
from offramp.studies.study.frontier import save_frontiers
from offramp.studies.study.plan import GateFit
from offramp.studies.study.record import FRONTIERS, FULL, RunRecord, RunTiming
from offramp.training.config import TrainConfig
from offramp.training.loop import Progress, TrainResult, new_model, train
from offramp.version import __version__

HELD_OUT = 0.05
"""Share of the training text, taken from its end, on which thresholds are chosen, not trained."""


@dataclass(frozen=True, kw_only=True, repr=False)
class StudyText:
    """The texts of a study's runs."""

    train: str
    "Text to train on."
    held_out: str
    "Text to choose thresholds on."
    test: str
    "Text to report on."
    about: Mapping[str, Any]
    "Names and hashes of the texts and how they were split, for every report."

    def __repr__(self) -> str:
        parts = (f"{name} {len(getattr(self, name)):,}" for name in ("train", "held_out", "test"))
        return f"StudyText({', '.join(parts)} characters)"


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One model to train. The name of its folder is a hash of all that its figures depend on."""

    label: str
    "Label of its recipe, which its figures do not depend on."
    text: StudyText
    tokenizer: str
    test_tokens: int
    "Tokens of the test text that are read, from its start."
    measures: tuple[str, ...]
    "Confidence measures by which tokens leave."
    gates: GateFit
    model: DecoderConfig
    "The vocabulary size is set from the corpus."
    training: TrainConfig
    specialise: SpecialiseConfig | None = None
    "How to specialise the exits after training; None: they stay as trained."
    decoding: bool = False
    """Whether its figures are chosen by the cache that decodes. Under ``propagate`` it then has
    twice as many policies, which weigh the costs of ``propagate``, and a frontier on the held-out
    text. (The default keeps the names of the runs that were made before this was known.)"""

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The exits of the model that it leaves, the last layer included."""
        added = () if self.specialise is None else self.specialise.add_exits
        return tuple(sorted({*self.model.exit_layers, *added}))

    @property
    def conventions(self) -> tuple[str, ...]:
        """The meanings of ``missing_kv`` that it has figures for, the one to look at first.

        Where all early exits are complete there is one, "exact".
        """
        shape = self.model
        if are_complete(
            self.exit_layers,
            complete_from=shape.complete_from,
            num_layers=shape.num_hidden_layers,
        ):
            return (EXACT,)
        return ("propagate", "recompute") if self.decoding else ("recompute", "propagate")

    @property
    def config(self) -> dict[str, Any]:
        """Everything that the figures depend on, as run.json holds it.

        A model without early exits has neither gates nor measures, and no token that leaves, so
        studies that differ only in those share its run.
        """
        record = stored_fields(self, FORMAT_FIELDS["StudyRun"])
        del record["label"]
        record["text"] = self.text.about
        if len(self.model.exit_layers) == 1:
            record |= {"measures": (), "gates": None}
            record.pop("decoding", None)
        return {"format": FORMAT, **nested_records(record)}

    @property
    def tokens(self) -> int:
        """Number of training tokens."""
        return (self.training.steps or 0) * self.training.batch_size * self.training.seq_len

    @cached_property
    def name(self) -> str:
        """The name of the run's folder: a hash of ``config``."""
        written = json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(written.encode()).hexdigest()[:16]

    def tokenised(self) -> tuple[Tokenizer, Tensor, Tensor, Tensor]:
        """The tokenizer, and the tokens to train on, to choose on and to report on.

        Raises CorpusError where there are too few of them.
        """
        tokenizer = make_tokenizer(self.tokenizer, Text(lambda: [self.text.train]))
        train_ids, held_out, test = (
            encode(tokenizer, text)
            for text in (self.text.train, self.text.held_out, self.text.test)
        )
        test = test[: self.test_tokens + 1]
        batch = self.training.batch_size * self.training.seq_len
        if min(len(held_out), len(test)) < 2 or len(train_ids) < batch + 1:
            raise CorpusError(
                f"{self.text.about['corpus']}: expected at least {batch + 1} tokens to train on "
                f"and 2 each to choose and to report on, got {len(train_ids)}, {len(held_out)} "
                f"and {len(test)}"
            )
        return tokenizer, train_ids, held_out, test

    def _windows(self, ids: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of the training text in a random order of their own."""
        order = torch.Generator().manual_seed(self.training.seed + 1)
        return batches(
            ids, seq_len=self.training.seq_len, batch_size=self.training.batch_size, order=order
        )

    def work(
        self,
        folder: Path,
        *,
        on_step: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> bool:
        """Train, specialise if the recipe says so, evaluate; leave the record and the model."""
        tokenizer, train_ids, held_out, test = self.tokenised()
        config = replace(self.model, vocab_size=vocabulary_size(tokenizer))
        model = new_model(config, seed=self.training.seed)
        start = time.perf_counter()
        result = train(
            model, train_ids, held_out, self.training, on_step=on_step, should_stop=should_stop
        )
        if not result.finished:
            return False
        trained = time.perf_counter()
        model.eval()
        left = None
        if self.specialise:
            add = self.specialise.add_exits
            model = with_own_heads(model, seed=self.specialise.seed, add=add)
            left = specialise_exits(model, self._windows(train_ids), self.specialise)
        specialised = time.perf_counter()
        if should_stop():
            return False
        evaluation = evaluate(
            model,
            train_ids,
            {"held_out": held_out, "test": test},
            measures=self.measures,
            gates=self.gates,
            seq_len=self.training.seq_len,
            seed=self.training.seed,
            decoding=self.decoding,
        )
        seconds = {
            "train": trained - start,
            "specialise": specialised - trained,
            "evaluate": time.perf_counter() - specialised,
        }
        self._save_model(model, tokenizer, evaluation.fitted, folder)
        save_frontiers(folder / FRONTIERS, evaluation.frontiers)
        timing_of(evaluation, seconds).save(folder)
        self._record(evaluation, result, left, test_tokens=len(test) - 1).save(folder)
        return True

    def _save_model(
        self, model: Transformer, tokenizer: Tokenizer, fitted: FittedExits, folder: Path
    ) -> None:
        corpus = {"name": self.text.about["corpus"], "sha256": self.text.about["sha256"]}
        about = {"training": asdict(self.training), "corpus": corpus}  # for sweep and others
        save_checkpoint(model, folder, about=about, weights_about={})
        save_tokenizer(tokenizer, folder)
        if fitted is not NOTHING_FITTED:
            save_fitted(fitted, folder, exits=file_sha256(folder / "model.safetensors"))

    def _record(
        self,
        evaluation: Evaluation,
        result: TrainResult,
        left: dict[int, float] | None,
        *,
        test_tokens: int,
    ) -> RunRecord:
        return RunRecord(
            label=self.label,
            config=self.config,
            train_tokens=self.tokens,
            test_tokens=test_tokens,
            exit_ppl=evaluation.exit_ppl,
            flops={
                FULL: evaluation.full_flops,
                **{f"{kind} gate": flops for kind, flops in evaluation.gate_flops.items()},
            },
            left_at_budget=left,
            validations=[asdict(validation) for validation in result.validations],
        )


def timing_of(evaluation: Evaluation, seconds: Mapping[str, float]) -> RunTiming:
    """What timing.json holds of a run on this machine."""
    return RunTiming(
        seconds=seconds,
        passes={FULL: [evaluation.full_pass], **evaluation.routed_passes},
        environment={"offramp": __version__, **environment("cpu")},
    )
