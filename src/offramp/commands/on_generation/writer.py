"""Write the texts that ``calibrate --on generation`` compares, and their losses."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.calibration.generated import divergence, nll_gap_loss, rouge_l_loss
from offramp.calibration.promise import DEFAULT_BOUND
from offramp.commands.chat_template import chat_tokenizer, message_ids
from offramp.commands.generate import prompt_ids
from offramp.commands.on_generation.config import Prompts, WriteConfig
from offramp.commands.text import read_text
from offramp.data.prompts import cut_prompts, read_prompts
from offramp.errors import ConfigError
from offramp.evaluation.cost import compute_pct, model_cost
from offramp.evaluation.trace import collect_trace
from offramp.files import file_sha256
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate_batch
from offramp.generation.rows import Completion
from offramp.models.open import OpenedModel

OnPrompt = Callable[[int, int], None]
"""Called with (texts written, texts that may be needed in all)."""
Thresholds = tuple[float, ...]


def prompts_of_file(opened: OpenedModel, path: Path, config: WriteConfig) -> Prompts:
    """Return the first prompts of a file; chats are put into the model's chat template."""
    found = read_prompts(path)[: config.max_prompts]
    template = chat_tokenizer(opened) if any(not isinstance(p, str) for p in found) else None
    ids = [
        prompt_ids(opened, each) if isinstance(each, str) else message_ids(opened, template, each)
        for each in found
    ]
    return Prompts(ids=ids, sha256=file_sha256(path), about=f"{len(ids):,} of {path.name}")


def prompts_of_text(opened: OpenedModel, corpus: str, config: WriteConfig) -> Prompts:
    """Return prompts that are cut from a text, spread evenly over it."""
    text = read_text(opened, corpus)
    ids = cut_prompts(
        text.ids,
        tokens=config.prompt_tokens,
        first=opened.first_tokens,
        at_most=config.max_prompts,
    )
    about = f"{len(ids):,} cuts of {config.prompt_tokens} tokens of {text.corpus.name}"
    return Prompts(ids=ids, sha256=text.corpus.sha256, about=about)


@dataclass(frozen=True, kw_only=True)
class Written:
    """The texts that continue the prompts, at full depth or with thresholds."""

    texts: list[Completion]
    seconds: float

    @property
    def tokens(self) -> int:
        """Number of new tokens."""
        return sum(len(text.tokens) for text in self.texts)

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, the prompts included, with ``rows`` texts at once."""
        return self.tokens / self.seconds

    def exits(self, layers: Sequence[int]) -> list[int]:
        """Return the number of tokens by exit layer."""
        left = [token.exit_layer for text in self.texts for token in text.tokens]
        return [left.count(layer) for layer in layers]


def _require_space(longest: int, prompts: Prompts, config: WriteConfig) -> None:
    most = longest - config.max_new_tokens + 1  # the last new token needs no position
    for number, ids in enumerate(prompts.ids, start=1):
        if not 1 <= len(ids) <= most:
            raise ConfigError(
                f"prompts: expected from 1 to {most} tokens each, so that {config.max_new_tokens} "
                f"new ones fit into the model's longest sequence of {longest}, got {len(ids)} in "
                f"prompt {number}"
                if most > 0
                else f"max_new_tokens: expected at most {longest}, the model's longest sequence, "
                f"got {config.max_new_tokens}"
            )


class Writer:
    """Writes the texts of the same prompts with different thresholds, and compares them.

    Raises ConfigError for a prompt without tokens, and for one that leaves too little space in the
    model's longest sequence: a shorter text would have fewer tokens that can leave.
    """

    def __init__(
        self,
        opened: OpenedModel,
        prompts: Prompts,
        config: WriteConfig,
        *,
        confidence: str,
        on_prompt: OnPrompt | None = None,
        most: int = 1,
    ) -> None:
        _require_space(opened.model.max_length, prompts, config)
        self.opened, self.prompts, self.config = opened, prompts, config
        self.confidence, self.on_prompt, self.most = confidence, on_prompt, most
        self._own_nll = dict[int, float]()  # of full depth's texts, by number
        self.done = 0
        "Texts written so far, of ``most`` times the number of prompts and those at full depth."

    @cached_property
    def full(self) -> Written:
        """The texts of full depth."""
        return self.write(None)

    def write(self, thresholds: Thresholds | None) -> Written:
        """Continue every prompt; None for full depth."""
        opened, found = self.opened, list[Completion]()
        config = GenerateConfig(
            max_new_tokens=self.config.max_new_tokens,
            stop_tokens=tuple(opened.end_tokens),
            threshold=thresholds,
            confidence=self.confidence if thresholds else None,
            missing_kv=self.config.missing_kv,
        )
        began = time.perf_counter()
        rows = self.config.rows
        for first in range(0, len(self.prompts.ids), rows):
            texts, _ = generate_batch(
                opened.model,
                self.prompts.ids[first : first + rows],
                config,
                tokenizer=opened.tokenizer,
                fitted=opened.fitted,
            )
            found += texts
            self.done += len(texts)
            if self.on_prompt:
                self.on_prompt(self.done, (1 + self.most) * len(self.prompts.ids))
        return Written(texts=found, seconds=time.perf_counter() - began)

    def losses(self, early: Written, risk: str, *, bound: float = DEFAULT_BOUND) -> Any:
        """Return (n,) losses from 0 to 1 of the texts against those of full depth."""
        full = self.full.texts
        found = np.zeros(len(full))
        other = [n for n, text in enumerate(early.texts) if text.ids != full[n].ids]
        if risk == "nll-gap":
            self._own_nll |= self._mean_nll(full, [n for n in other if n not in self._own_nll])
            for n, nll in self._mean_nll(early.texts, other).items():
                found[n] = nll_gap_loss(self._own_nll[n], nll, bound=bound)
            return found
        for n in other:
            if risk == "divergence":
                found[n] = divergence(full[n].ids, early.texts[n].ids)
            else:
                found[n] = rouge_l_loss(full[n].text, early.texts[n].text)
        return found

    def _mean_nll(self, texts: Sequence[Completion], chosen: Sequence[int]) -> dict[int, float]:
        """Return the full model's mean NLL of the texts with these numbers, by number.

        Texts of equal length, after prompts of equal length, run together.
        """
        model, found = self.opened.model, dict[int, float]()
        lengths = {n: (len(self.prompts.ids[n]), len(texts[n].ids)) for n in chosen}
        rows = self.config.rows
        for (_, new), same in groupby(sorted(chosen, key=lengths.__getitem__), lengths.__getitem__):
            alike = [*same]
            for some in (alike[at : at + rows] for at in range(0, len(alike), rows)):
                ids = torch.tensor([[*self.prompts.ids[n], *texts[n].ids] for n in some])
                trace = collect_trace(
                    model, [(ids[:, :-1], ids[:, -new:])], layers=(model.num_layers,), measures=()
                )
                means = trace.nll[-1].reshape(len(some), new).mean(axis=1, dtype=np.float64)
                found |= zip(some, means.tolist(), strict=True)
        return found

    def cost(self, written: Written, thresholds: Thresholds) -> tuple[float, float]:
        """Return Compute% and FLOPs% of new tokens, by the exits at which they left."""
        model, layers = self.opened.model, tuple(self.opened.model.exit_layers)
        counts = written.exits(layers)
        mean = sum(map(len, self.prompts.ids)) / len(self.prompts.ids)
        context = mean + (written.tokens / len(written.texts) + 1) / 2
        cost = model_cost(model, context=context, fitted=self.opened.fitted)
        by_exit = cost.flops_pct_by_exit(
            self.confidence,
            evaluated=[math.isfinite(threshold) for threshold in thresholds],
            missing_kv=self.config.missing_kv,
        )
        flops = float(np.dot(by_exit, counts)) / sum(counts)
        return compute_pct(counts, layers, model.num_layers), flops
