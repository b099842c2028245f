"""Choose a token from logits: greedy, temperature, top-k, top-p, repetition penalty, seeds.

A token is drawn by an exponential race: with E_v ~ Exp(1), argmax_v p(v) / E_v has distribution
p. The E of the n-th new token of a row depend only on the row's seed and n, so that a draft and the
model that verifies it use the same random numbers: see speculative.py.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from offramp.errors import GenerationError
from offramp.generation.config import SamplingConfig
from offramp.generation.transfer import moved, on_device, read

COLDEST = 1e-30
"""Below this temperature, float32 cannot hold the logits that are divided by it."""
LEAST_MASS = 1e-30
"""A smaller ``top_p`` is this number: float32 rounds what is much smaller to 0."""
Likeliest = tuple[float, int]
"""The largest of some logits, and its token id."""


def likeliest_with(
    logits: Float[Tensor, "B W"],
    *others: Float[Tensor, " B"],
    vocab: Int[Tensor, " W"] | None = None,
) -> tuple[list[Likeliest], list[list[float]]]:
    """Return the likeliest token of each row, and ``others``, read together with it.

    ``vocab`` names the tokens of the logits if they are not all.
    """
    best, place = logits.max(dim=-1)
    tops, tokens, *numbers = read(best, place if vocab is None else vocab[place], *others)
    return [(top, int(token)) for top, token in zip(tops, tokens, strict=True)], numbers


def penalise(
    logits: Float[Tensor, " V"], seen: Bool[Tensor, " V"], penalty: float
) -> Float[Tensor, " V"]:
    """Divide the positive and multiply the negative logits of ``seen`` tokens (Keskar 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def distribution(logits: Float[Tensor, " V"], config: SamplingConfig) -> Float[Tensor, " V"]:
    """Return the probabilities (V,) of a draw: temperature, then top-k, then top-p."""
    if config.temperature < COLDEST:
        logits = (logits - logits.max()).double()
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < len(logits):
        least = logits.topk(config.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    probs = logits.softmax(dim=-1)
    if config.top_p is not None and config.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = (
            ordered.cumsum(dim=-1) - ordered
        )  # the sum of more likely tokens, so the first token is always kept
        left_out = torch.zeros_like(probs, dtype=torch.bool)
        most = max(config.top_p, LEAST_MASS)
        probs = probs.masked_fill(left_out.scatter(0, order, before >= most), 0.0)
        probs = probs / probs.sum()
    return probs


class Sampler:
    """Chooses the tokens of one row; the n-th token uses the n-th draw."""

    def __init__(
        self, config: SamplingConfig, prompt: Iterable[int], *, vocab_size: int, row: int = 0
    ) -> None:
        self.config, self.vocab_size = config, vocab_size
        self._seen = set(prompt)
        self._generator = torch.Generator().manual_seed(config.seed + row)
        self._races: deque[Tensor] = deque()  # those of the tokens from _kept on
        self._kept = 0

    def choose(
        self,
        logits: Float[Tensor, " W"],
        index: int,
        *,
        after: Sequence[int] = (),
        vocab: Int[Tensor, " W"] | None = None,
        exit_layer: int | None = None,
        likeliest: Likeliest | None = None,
    ) -> int:
        """Choose the ``index``-th new token (from 0).

        ``after`` are tokens that follow the kept ones, such as drafts. ``vocab`` names the tokens
        of the logits if they are not all. ``likeliest`` is the largest of the logits and its token,
        if it is known. Raises GenerationError for logits that are not finite,
        and names the ``exit_layer`` that they are from.
        """
        config = self.config
        if config.repetition_penalty != 1.0:
            seen = torch.zeros(self.vocab_size, dtype=torch.bool)
            seen[on_device([*self._seen, *after], seen.device)] = True
            seen = moved(seen, logits.device)
            here = seen if vocab is None else seen[vocab]
            logits = penalise(logits, here, config.repetition_penalty)
            likeliest = None
        if likeliest is None or not config.greedy:
            top, place = logits.max(dim=-1)
            if not config.greedy:
                race = moved(self._race(index), logits.device)
                race = race if vocab is None else race[vocab]
                place = (distribution(logits.float(), config) / race).argmax()
            tokens = place if vocab is None else vocab[place]
            [best], [chosen] = read(top[None], tokens[None])
            likeliest = best, int(chosen)
        best, token = likeliest
        if not math.isfinite(best):
            of = "" if exit_layer is None else f" of exit layer {exit_layer}"
            raise GenerationError(
                f"logits{of}: expected finite numbers for new token {index + 1}, got "
                f"{best}: check the weights of the model and its precision"
            )
        return token

    def keep(self, token: int) -> None:
        """Keep a chosen token; the next draw is for the token after it."""
        self._seen.add(token)
        self._kept += 1
        if self._races:
            self._races.popleft()

    def _race(self, index: int) -> Float[Tensor, " V"]:
        while self._kept + len(self._races) <= index:
            race = torch.empty(self.vocab_size).exponential_(generator=self._generator)
            self._races.append(race)
        return self._races[index - self._kept]
