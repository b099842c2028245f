"""One training run of a study, and what is kept of it."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from offramp.calibration.specialise import specialise_exits, with_own_heads
from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.data import batches, encode, make_tokenizer
from offramp.data.text import Text
from offramp.data.tokenizer import TOKENIZER_FILE
from offramp.environment import environment
from offramp.errors import CorpusError
from offramp.files import stored_fields, write_json
from offramp.models.native.checkpoint import save_checkpoint
from offramp.models.native.config import DecoderConfig
from offramp.studies.study.evaluate import evaluate
from offramp.studies.study.format import FORMAT, FORMAT_FIELDS, nested_records
from offramp.studies.study.plan import GateFit
from offramp.training.config import TrainConfig
from offramp.training.loop import Progress, new_model, train
from offramp.version import __version__

FRONTIERS = "frontiers.npz"
TIMING = "timing.json"
HELD_OUT = 0.05
"""Share of the training text, its end, that no run trains on: there thresholds are chosen."""


@dataclass(frozen=True, kw_only=True)
class StudyText:
    """What the runs train on, choose on and are judged on."""

    train: str
    held_out: str
    test: str
    about: dict[str, Any]
    "Names, hashes and the split; belongs beside every figure."


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One model to train; its folder's name is the hash of all that its figures depend on."""

    label: str
    text: StudyText
    tokenizer: str
    test_tokens: int
    measures: tuple[str, ...]
    gates: GateFit
    model: DecoderConfig
    training: TrainConfig
    specialise: SpecialiseConfig | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Everything that the figures depend on, as run.json holds it.

        A model without early exits has neither gates nor measures, so studies that differ only
        in those share its run.
        """
        record = stored_fields(self, FORMAT_FIELDS["StudyRun"])
        del record["label"]
        record["text"] = self.text.about
        if len(self.model.exit_layers) == 1:
            record |= {"measures": (), "gates": None}
        return {"format": FORMAT, **nested_records(record)}

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return (self.training.steps or 0) * self.training.batch_size * self.training.seq_len

    @cached_property
    def name(self) -> str:
        """The run's folder."""
        written = json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(written.encode()).hexdigest()[:16]

    def tokenised(self) -> tuple[Tokenizer, Tensor, Tensor, Tensor]:
        """The tokenizer, and the tokens to train, to choose and to report on.

        CorpusError where they are too few.
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
        """Training text in a random order, another than that of training and of the gates."""
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
        """Train; keep ``run.json``, ``timing.json``, the model and its frontiers."""
        tokenizer, train_ids, held_out, test = self.tokenised()
        config = replace(self.model, vocab_size=tokenizer.get_vocab_size())
        model = new_model(config, seed=self.training.seed)
        start = time.perf_counter()
        result = train(
            model,
            train_ids,
            held_out,
            self.training,
            on_step=on_step,
            should_stop=should_stop,
        )
        if not result.finished:
            return False
        trained = time.perf_counter()
        model.eval()
        left = None
        if self.specialise:
            model = with_own_heads(model, seed=self.specialise.seed)
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
        )
        evaluation.save(folder / FRONTIERS)
        about = {
            "label": self.label,
            "config": self.config,
            "train_tokens": self.tokens,
            "test_tokens": len(test) - 1,
            "exit_ppl": evaluation.exit_ppl,
            "flops": evaluation.flops,
            "left_at_budget": left,
            "validations": [asdict(validation) for validation in result.validations],
        }
        corpus = {"name": self.text.about["corpus"], "sha256": self.text.about["sha256"]}
        as_trained = {"training": asdict(self.training), "corpus": corpus}  # for sweep and others
        save_checkpoint(model, folder, about=as_trained, weights_about={})
        tokenizer.save(str(folder / TOKENIZER_FILE))
        seconds = {
            "train": trained - start,
            "specialise": specialised - trained,
            "evaluate": time.perf_counter() - specialised,
        }
        write_json(
            folder / TIMING,
            {
                "seconds": seconds,
                "passes": evaluation.seconds,
                "environment": {"offramp": __version__, **environment("cpu")},
            },
        )
        write_json(folder / "run.json", about)
        return True
