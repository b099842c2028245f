"""Confidence measures: scores by which tokens leave at an exit. A higher score favours leaving.

A measure reads an ``ExitView`` of some tokens at one exit. A trace makes views of all tokens at
all exits; a decoder makes views of the tokens that it decodes. Logits are computed only when a
measure reads them, so an exit with a gate needs the LM head only for the tokens that leave.

The score of a token does not depend on the other tokens of the batch. It is float32, or float64
if its inputs are (gates compute in float32). New measures are added to ``CONFIDENCE`` under the
name that the literature uses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits.gate import NOTHING_FITTED, FittedExits, agreement_probability, expected_kl


class Agreement(NamedTuple):
    """An exit's most likely token, and how many exits in a row, with this one, predict it.

    If only some tokens continue, select them with ``Agreement(argmax[rows], exits[rows])``.
    """

    argmax: Int[Tensor, "*B"]
    exits: Int[Tensor, "*B"]


class ExitView:
    """The data of a batch of tokens at one exit; each part is computed on first access.

    ``state`` (*B, D) is the state after ``exit_layer`` blocks. ``previous_state`` is the state
    one block earlier (for exit layer 1, the embedding); only ``saturation`` reads it. ``logits``
    are (*B, V), or a function that computes them. ``earlier`` is the ``agreement`` of the
    previous exit for the same tokens (None at the first exit); only ``patience`` reads it.
    ``fitted`` holds the gates and temperatures.
    """

    def __init__(
        self,
        *,
        exit_layer: int,
        logits: Tensor | Callable[[], Tensor] | None = None,
        state: Float[Tensor, "*B D"] | None = None,
        previous_state: Float[Tensor, "*B D"] | None = None,
        earlier: Agreement | None = None,
        fitted: FittedExits = NOTHING_FITTED,
    ) -> None:
        self.exit_layer, self.earlier, self.fitted = exit_layer, earlier, fitted
        self._logits, self._state, self._previous_state = logits, state, previous_state

    @cached_property
    def logits(self) -> Float[Tensor, "*B V"]:
        """The logits, in float32 or a wider type."""
        assert self._logits is not None, "a view without logits"
        return _wide(self._logits() if callable(self._logits) else self._logits)

    @cached_property
    def log_probs(self) -> Float[Tensor, "*B V"]:
        """The log-probabilities at the exit's temperature."""
        temperature = self.fitted.temperature(self.exit_layer)
        logits = self.logits if temperature == 1.0 else self.logits / temperature
        return F.log_softmax(logits, dim=-1)

    @cached_property
    def argmax(self) -> Int[Tensor, "*B"]:
        """The exit's most likely token; the lowest id if several are equally likely."""
        if self.logits.device.type != "cpu":
            return self.logits.argmax(dim=-1)
        # NumPy's argmax is ten times as fast as PyTorch's on a CPU, with the same result
        return torch.from_numpy(np.asarray(self.logits.detach().numpy().argmax(axis=-1)))

    @cached_property
    def agreement(self) -> Agreement:
        """The agreement up to this exit; the view of the next exit takes it as ``earlier``."""
        alone = torch.ones_like(self.argmax)
        if self.earlier is None:
            return Agreement(self.argmax, alone)
        same = self.argmax == self.earlier.argmax
        return Agreement(self.argmax, torch.where(same, self.earlier.exits + 1, alone))

    @property
    def state(self) -> Float[Tensor, "*B D"]:
        """The state after ``exit_layer`` blocks."""
        assert self._state is not None, "a view without its state"
        return self._state

    @property
    def previous_state(self) -> Float[Tensor, "*B D"]:
        """The state one block earlier."""
        assert self._previous_state is not None, "a view without the state before"
        return self._previous_state

    @cached_property
    def expected_kl(self) -> Float[Tensor, "*B K"]:
        """KL(p_L || p) in nats as the ``gain`` gate predicts it, at this and each later exit."""
        return expected_kl(self.fitted.gate("gain", self.exit_layer)(self.state))


def max_prob(view: ExitView) -> Float[Tensor, "*B"]:
    """Return the largest probability, max_v p(v); in (0, 1]."""
    return view.log_probs.amax(dim=-1).exp()


def margin(view: ExitView) -> Float[Tensor, "*B"]:
    """Return the largest probability minus the second largest; in [0, 1], and 1 if V is 1."""
    if view.logits.shape[-1] == 1:
        return torch.ones_like(view.logits[..., 0])
    first, second = view.log_probs.topk(2, dim=-1).values.exp().unbind(dim=-1)
    return first - second


def entropy(view: ExitView) -> Float[Tensor, "*B"]:
    """Return 1 - H / ln V, H = -sum p ln p: 0 for a uniform distribution, 1 for a certain token."""
    vocab_size = view.logits.shape[-1]
    if vocab_size == 1:
        return torch.ones_like(view.logits[..., 0])
    finite = view.log_probs.clamp(min=torch.finfo(view.log_probs.dtype).min)  # 0 x -inf is NaN
    entropy = -(finite.exp() * finite).sum(dim=-1)
    return (1.0 - entropy / math.log(vocab_size)).clamp(0.0, 1.0)


def saturation(view: ExitView) -> Float[Tensor, "*B"]:
    """Return the cosine of the state and the one a block earlier (CALM, section 3.3); [-1, 1]."""
    return F.cosine_similarity(_wide(view.state), _wide(view.previous_state), dim=-1).clamp(-1, 1)


def patience(view: ExitView) -> Float[Tensor, "*B"]:
    """Return how many exits in a row, with this one, predict the same token (PABEE); 1, 2, ..."""
    return view.agreement.exits.to(view.logits.dtype)


def gate(view: ExitView) -> Float[Tensor, "*B"]:
    """Return the gate's probability that the last layer predicts the same token; in [0, 1]."""
    return agreement_probability(view.fitted.gate("gate", view.exit_layer)(view.state))


def gain(view: ExitView) -> Float[Tensor, "*B"]:
    """Return minus the predicted KL(p_L || p_e) in nats: at most 0.

    With a threshold of -0.05 a token leaves if the predicted loss of leaving is at most 0.05
    nats.
    """
    return -view.expected_kl[..., 0]


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """A confidence measure, with what it needs and what its score means."""

    score: Callable[[ExitView], Float[Tensor, "*B"]]
    needs_head: bool = True
    "Whether it reads logits, so that every evaluated exit costs its head."
    needs_previous_state: bool = False
    needs_gate: bool = False
    is_probability: bool = False
    "Whether the score is an estimated probability that the prediction is right."


CONFIDENCE: dict[str, Confidence] = {
    "max_prob": Confidence(score=max_prob, is_probability=True),
    "margin": Confidence(score=margin),
    "entropy": Confidence(score=entropy),
    "saturation": Confidence(score=saturation, needs_head=False, needs_previous_state=True),
    "patience": Confidence(score=patience),
    "gate": Confidence(score=gate, needs_head=False, needs_gate=True, is_probability=True),
    "gain": Confidence(score=gain, needs_head=False, needs_gate=True),
}
"""The confidence measures by name."""


def confidence_named(name: str) -> Confidence:
    """Return the measure with this name. Raises ConfigError if there is none."""
    if name not in CONFIDENCE:
        raise ConfigError(f"confidence: expected one of {', '.join(CONFIDENCE)}, got {name!r}")
    return CONFIDENCE[name]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
