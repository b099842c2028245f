"""The seconds of decoding: until the first token, and for each token after it.

The text is given, so that every model decodes the same tokens. Exits may be given, too
(``ReplayedExits``): the seconds of a policy then belong to the exits that it chose elsewhere.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from offramp.exits.confidence import ExitView
from offramp.generation.confident_exit import ExitDecoder
from offramp.generation.exit_rule import ExitRule
from offramp.generation.exits import Exits
from offramp.models.base import EarlyExitModel
from offramp.models.missing_kv import MissingKV


@dataclass(frozen=True, kw_only=True)
class DecodingTime:
    """The seconds that a batch of texts took."""

    first_seconds: float
    "Seconds from the prompts to the first new token of every row."
    seconds: float
    "Seconds of all later tokens."
    tokens: int
    "Number of later tokens, of all rows together."
    layers_run: int
    "Number of blocks that ran for them, counted for each token."

    @property
    def tokens_per_s(self) -> float:
        """Later tokens a second, of all rows together."""
        return self.tokens / self.seconds

    @property
    def mean_layers(self) -> float:
        """Mean number of blocks that ran for a later token."""
        return self.layers_run / self.tokens


@dataclass(frozen=True, kw_only=True)
class ReplayedExits(ExitRule):
    """Computes the confidence and what the policy decides, but lets tokens leave at given exits.

    It is made for one batch that decodes all its rows together, and used once.
    """

    exits: Int[NDArray[np.intp], "B N"]
    "Index of the exit where the n-th new token of each row leaves."
    _running: list[int] = field(default_factory=list, repr=False)
    "The rows that reach the next exit."

    def evaluate(
        self, index: int, view: ExitView, positions: list[int]
    ) -> tuple[list[float], list[bool]]:
        """Return the confidence of each token, and whether it leaves at the ``index``-th exit."""
        scores, _ = super().evaluate(index, view, positions)
        if index == 0:
            self._running[:] = range(len(self.exits))
        leaving = [
            bool(self.exits[row, place] == index)
            for row, place in zip(self._running, positions, strict=True)
        ]
        self._running[:] = [
            row for row, leaves in zip(self._running, leaving, strict=True) if not leaves
        ]
        return scores, leaving


@torch.inference_mode()
def decoding_time(
    model: EarlyExitModel,
    texts: Int[Tensor, "B T"],
    *,
    prompt_tokens: int,
    rule: ExitRule | None = None,
    missing_kv: MissingKV = "propagate",
) -> DecodingTime:
    """Decode texts after their first ``prompt_tokens`` tokens, and measure the seconds.

    Each step runs the next token of the text and takes the likeliest token after it, which the
    text replaces. With ``rule`` None all layers run.
    """
    rows = range(len(texts))
    prompts, later = texts[:, :prompt_tokens].tolist(), texts[:, prompt_tokens:].T.tolist()
    decoder = ExitDecoder(
        model,
        model.make_cache(*texts.shape),
        batch_size=len(texts),
        rule=rule,
        missing_kv=missing_kv,
    )
    start = time.perf_counter()
    decoder.prefill(prompts)
    first = time.perf_counter()
    for ids in later:
        _likeliest(decoder.decode_one_token(ids, rows))
    end = time.perf_counter()
    return DecodingTime(
        first_seconds=first - start,
        seconds=end - first,
        tokens=len(later) * len(texts),
        layers_run=decoder.work.layers_run,
    )


def representative_exits(
    exits: Int[NDArray[np.intp], "W N"], exit_layers: Sequence[int], *, rows: int, tokens: int
) -> Int[NDArray[np.intp], "B n"]:
    """Return the exits of ``rows`` stretches of ``tokens`` tokens, as deep as all on average.

    ``exits`` holds the index of each token's exit in some windows. Of each window that stretch is
    taken whose mean depth is closest to that of all windows, and of these the closest ones; if
    there are too few windows, some are taken again.
    """
    depth = np.asarray(exit_layers)[exits]
    sums = np.cumsum(np.pad(depth, ((0, 0), (1, 0))), axis=1)
    means = (sums[:, tokens:] - sums[:, :-tokens]) / tokens
    distance = np.abs(means - depth.mean())
    starts = distance.argmin(axis=1)
    order = distance.min(axis=1).argsort(kind="stable")
    chosen = np.resize(order, rows)
    return np.stack([exits[window, starts[window] :][:tokens] for window in chosen])


def _likeliest(exits: Exits) -> list[int]:
    """Choose the likeliest token of each row, as greedy decoding does."""
    if exits.likeliest is not None:
        return [token for _, token in exits.likeliest]
    found: list[int] = exits.logits.argmax(dim=-1).tolist()
    return found
