"""Confidence: whether a token may leave at an exit, as a score. Higher always means leave.

A measure reads an ``ExitView``: what one exit knows of some tokens. The trace makes views of all
tokens at all exits, a decoder of those that it is at; logits are computed only when a measure
asks for them, so an exit with a gate needs the LM head only for the tokens that leave.

Every score depends on its own token alone, never on the batch. It is float32, or float64 where
its ingredients are (gates compute in float32). New measures register in ``CONFIDENCE`` under the
field's name.
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
    """An exit's first choice, and how many exits in a row had it, this one included.

    A decoder whose tokens left in part goes on with ``Agreement(argmax[rows], exits[rows])``.
    """

    argmax: Int[Tensor, "*B"]
    exits: Int[Tensor, "*B"]


class ExitView:
    """What one exit knows of a batch of tokens, each part computed when it is first asked for.

    ``state`` (*B, D) is the state after ``exit_layer`` blocks and ``previous_state`` the one a
    block before (for exit layer 1: the embedding), which only ``saturation`` reads. ``logits``
    are (*B, V), or a function that computes them. ``earlier`` is the ``agreement`` of the exit
    before for the same tokens (None at the first), which only ``patience`` reads. ``fitted``
    holds the gates and temperatures.
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
        """At least float32."""
        assert self._logits is not None, "a view without logits"
        return _wide(self._logits() if callable(self._logits) else self._logits)

    @cached_property
    def log_probs(self) -> Float[Tensor, "*B V"]:
        """ln p at the exit's temperature."""
        temperature = self.fitted.temperature(self.exit_layer)
        logits = self.logits if temperature == 1.0 else self.logits / temperature
        return F.log_softmax(logits, dim=-1)

    @cached_property
    def argmax(self) -> Int[Tensor, "*B"]:
        """The exit's first choice; of equals, the first."""
        if self.logits.device.type != "cpu":
            return self.logits.argmax(dim=-1)
        # NumPy's is ten times as fast as PyTorch's on a CPU, and says the same
        return torch.from_numpy(np.asarray(self.logits.detach().numpy().argmax(axis=-1)))

    @cached_property
    def agreement(self) -> Agreement:
        """What the next exit's view gets as ``earlier``."""
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
        """The state a block before."""
        assert self._previous_state is not None, "a view without the state before"
        return self._previous_state

    @cached_property
    def expected_kl(self) -> Float[Tensor, "*B K"]:
        """What the ``gain`` gate expects of KL(p_L || p), nats, here and at each later exit."""
        return expected_kl(self.fitted.gate("gain", self.exit_layer)(self.state))


def max_prob(view: ExitView) -> Float[Tensor, "*B"]:
    """The largest probability, max_v p(v); in (0, 1]."""
    return view.log_probs.amax(dim=-1).exp()


def margin(view: ExitView) -> Float[Tensor, "*B"]:
    """The largest probability minus the second, p(1) - p(2); in [0, 1], and 1 if V is 1."""
    if view.logits.shape[-1] == 1:
        return torch.ones_like(view.logits[..., 0])
    first, second = view.log_probs.topk(2, dim=-1).values.exp().unbind(dim=-1)
    return first - second


def entropy(view: ExitView) -> Float[Tensor, "*B"]:
    """1 - H / ln V, H = -sum p ln p: 0 where all tokens are as likely, 1 where one is certain."""
    vocab_size = view.logits.shape[-1]
    if vocab_size == 1:
        return torch.ones_like(view.logits[..., 0])
    finite = view.log_probs.clamp(min=torch.finfo(view.log_probs.dtype).min)  # 0 x -inf is NaN
    entropy = -(finite.exp() * finite).sum(dim=-1)
    return (1.0 - entropy / math.log(vocab_size)).clamp(0.0, 1.0)


def saturation(view: ExitView) -> Float[Tensor, "*B"]:
    """Cosine of the state with the one a block before (CALM, section 3.3); in [-1, 1]."""
    return F.cosine_similarity(_wide(view.state), _wide(view.previous_state), dim=-1).clamp(-1, 1)


def patience(view: ExitView) -> Float[Tensor, "*B"]:
    """How many exits in a row, this one included, have the same first choice (PABEE); 1, 2, ..."""
    return view.agreement.exits.to(view.logits.dtype)


def gate(view: ExitView) -> Float[Tensor, "*B"]:
    """The gate's probability that the last layer agrees; in [0, 1]."""
    return agreement_probability(view.fitted.gate("gate", view.exit_layer)(view.state))


def gain(view: ExitView) -> Float[Tensor, "*B"]:
    """Minus the expected KL(p_L || p_e) in nats: at most 0.

    Its threshold is minus a price: -0.05 lets a token leave where leaving is expected to lose
    at most 0.05 nats.
    """
    return -view.expected_kl[..., 0]


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """A measure, and what it costs and means."""

    score: Callable[[ExitView], Float[Tensor, "*B"]]
    needs_head: bool = True
    "Reads logits, so every exit that is passed costs its head."
    needs_previous_state: bool = False
    needs_gate: bool = False
    is_probability: bool = False
    "The score claims to be a probability of being right."


CONFIDENCE: dict[str, Confidence] = {
    "max_prob": Confidence(score=max_prob, is_probability=True),
    "margin": Confidence(score=margin),
    "entropy": Confidence(score=entropy),
    "saturation": Confidence(score=saturation, needs_head=False, needs_previous_state=True),
    "patience": Confidence(score=patience),
    "gate": Confidence(score=gate, needs_head=False, needs_gate=True, is_probability=True),
    "gain": Confidence(score=gain, needs_head=False, needs_gate=True),
}
"""Every measure by its name."""


def confidence_named(name: str) -> Confidence:
    """The measure of that name; ConfigError where there is none."""
    if name not in CONFIDENCE:
        raise ConfigError(f"confidence: expected one of {', '.join(CONFIDENCE)}, got {name!r}")
    return CONFIDENCE[name]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
