"""What one run of ``offramp bench`` decodes: a model and its prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from jaxtyping import Int
from torch import Tensor

from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.methods import Batch, Method, own, own_prefill
from offramp.commands.bench.quality import Windows, routed_ppl
from offramp.errors import ConfigError, CorpusError
from offramp.exits.default_confidence import confidence_and_threshold, default_confidence
from offramp.exits.gate import FittedExits
from offramp.generation.config import GenerateConfig
from offramp.models.base import EarlyExitModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A model in one weight format, what was fitted to its exits, and what every method decodes."""

    model: EarlyExitModel
    fitted: FittedExits
    config: BenchConfig
    prompts: Sequence[Batch]
    "The prompts in batches of ``config.batch_size``."
    weights: str = "float32"
    "The name of the weight format."
    long_prompts: Sequence[Sequence[int]] = ()
    "The prompt of ``config.prefill_tokens`` tokens that goes with each batch."
    windows: Windows = ()
    "The windows of the text on which PPL is measured."

    @property
    def early_exits(self) -> tuple[int, ...]:
        """The exit layers before the last layer."""
        return tuple(self.model.exit_layers[:-1])

    @property
    def confidences(self) -> tuple[str, ...]:
        """The confidence measures to time: the chosen one, or ``gain`` first where it is fitted."""
        if self.config.confidence is not None:
            return (self.config.confidence,)
        chosen = default_confidence(self.fitted, self.model.exit_layers)
        return tuple(dict.fromkeys((chosen, "max_prob")))

    def threshold(self, written: float) -> Any:
        """The threshold of the first measure, in its unit, for one that the user wrote."""
        return confidence_and_threshold(
            self.config.confidence,
            written,
            fitted=self.fitted,
            exit_layers=self.model.exit_layers,
        )[1]

    @cached_property
    def full_ppl(self) -> float:
        """The PPL at full depth."""
        return routed_ppl(self.model, self.windows)

    def full(self) -> Method:
        """Decoding at full depth, which also times the longer prompts."""
        return replace(self.method("full"), prefill=own_prefill(self.model))

    def method(self, name: str, *, threshold: float | None = None, **options: Any) -> Method:
        """One of offramp's own ways to decode; ``options`` are fields of ``GenerateConfig``."""
        new = self.config.max_new_tokens
        generate = GenerateConfig(max_new_tokens=new, threshold=threshold, **options)
        return own(
            name,
            self.model,
            generate,
            fitted=self.fitted,
            weights=self.weights,
            confidence=None if threshold is None else generate.confidence,
            threshold=threshold,
            ppl=partial(self._ppl, threshold, generate) if self.windows else None,
        )

    def _ppl(self, threshold: float | None, generate: GenerateConfig) -> float:
        """Return the PPL of a way to decode; drafts do not change it."""
        if threshold is None:
            return self.full_ppl
        return routed_ppl(
            self.model,
            self.windows,
            threshold=threshold,
            confidence=generate.confidence or self.confidences[0],
            missing_kv=generate.missing_kv,
            fitted=self.fitted,
        )


def prompts_of(
    ids: Int[Tensor, " N"],
    corpus_name: str,
    config: BenchConfig,
    *,
    max_length: int,
    first_tokens: Sequence[int] = (),
) -> list[list[int]]:
    """Return prompts at equal distances in a text.

    Each begins with ``first_tokens``, which are among its ``prompt_tokens``.

    Raises CorpusError for a text shorter than one prompt, and ConfigError where a prompt and
    its new tokens are longer than ``max_length``.
    """
    prompts = _at_equal_distances(
        ids, config.prompt_tokens, config.prompts, corpus_name, first_tokens=first_tokens
    )
    longest = config.prompt_tokens + config.max_new_tokens - 1
    if longest > max_length:
        raise ConfigError(
            f"max_new_tokens: expected at most {max_length} tokens with the prompt, "
            f"the model's longest sequence, got {longest}"
        )
    return prompts


def long_prompts_of(
    ids: Int[Tensor, " N"],
    corpus_name: str,
    config: BenchConfig,
    *,
    max_length: int,
    first_tokens: Sequence[int] = (),
) -> list[list[int]]:
    """Return a prompt of ``config.prefill_tokens`` tokens for each batch, as ``prompts_of``."""
    tokens = config.prefill_tokens
    if tokens is None:
        return []
    if tokens > max_length:
        raise ConfigError(
            f"prefill_tokens: expected at most {max_length}, the model's longest sequence, "
            f"got {tokens}"
        )
    batches = config.prompts // config.batch_size
    return _at_equal_distances(ids, tokens, batches, corpus_name, first_tokens=first_tokens)


def _at_equal_distances(
    ids: Int[Tensor, " N"],
    tokens: int,
    count: int,
    corpus_name: str,
    *,
    first_tokens: Sequence[int],
) -> list[list[int]]:
    if len(ids) < tokens:
        raise CorpusError(
            f"{corpus_name}: expected at least {tokens} tokens for a prompt, got {len(ids)}"
        )
    space = (len(ids) - tokens) / max(1, count)
    first = list(first_tokens)[: tokens - 1]
    taken = tokens - len(first)
    starts = [int(space * number) for number in range(count)]
    return [first + ids[start : start + taken].tolist() for start in starts]


def in_batches(prompts: Sequence[Sequence[int]], size: int) -> list[Batch]:
    """Return the prompts in batches of ``size``."""
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]
