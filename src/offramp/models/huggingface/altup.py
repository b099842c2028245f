"""The stacked states of Gemma 3n (AltUp, Baykal et al. 2023, arXiv 2301.13310).

Between its blocks a token has N states of width D: one that the block computed, and N - 1
predictions. The model merges them into one state before the final norm. In offramp they are one
state of width N D, so that a token that waits or leaves takes all of them along. ``MergedNorm``
merges them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from offramp.models.huggingface.calls import Call, close


@dataclass(frozen=True, kw_only=True, eq=False)
class AltUp:
    """How N states of a token are merged: N - 1 projections, scaled to the first one's size."""

    projections: tuple[nn.Module, ...]

    @property
    def count(self) -> int:
        """The number of states of a token, N."""
        return len(self.projections) + 1

    def flat(self, stacked: Float[Tensor, "N B T D"]) -> Float[Tensor, "B T ND"]:
        """Return the states of each token side by side."""
        return stacked.permute(1, 2, 0, 3).flatten(2)

    def stacked(self, h: Float[Tensor, "B T ND"]) -> Float[Tensor, "N B T D"]:
        """Return states side by side as the model's blocks take them."""
        apart: Tensor = h.unflatten(-1, (self.count, -1))
        return apart.permute(2, 0, 1, 3).contiguous()

    def merged(self, h: Float[Tensor, "*B ND"]) -> Float[Tensor, "*B D"]:
        """Return the one state of which the model takes the final norm."""
        first, *others = h.unflatten(-1, (self.count, -1)).unbind(-2)
        size = first.square().mean(dim=-1, keepdim=True).sqrt()
        states = [first]
        for projection, other in zip(self.projections, others, strict=True):
            x = projection(other)
            own = x.square().mean(dim=-1, keepdim=True).clamp(min=1e-5).sqrt()
            states.append(x * size / own)
        return torch.stack(states).mean(dim=0)


class MergedNorm(nn.Module):
    """The final norm of a model with stacked states, or that of an exit: (*B, N D) to (*B, D).

    Its only parameters are those of ``norm``: the model owns the projections.
    """

    def __init__(self, norm: nn.Module, altup: AltUp) -> None:
        super().__init__()
        self.norm = norm
        self.altup = altup

    def forward(self, h: Float[Tensor, "*B ND"]) -> Float[Tensor, "*B D"]:
        """Return the norm of the merged state."""
        out: Tensor = self.norm(self.altup.merged(h))
        return out


def altup_of(last: Call, after: Sequence[Call], merged: Tensor | None) -> AltUp | None:
    """Return how the output (N, B, T, D) of the last block becomes ``merged`` (B, T, D).

    ``after`` are the calls of modules after that block. It is None if this is another computation.
    """
    stacked = last.result
    if merged is None or not isinstance(stacked, Tensor) or stacked.shape[1:] != merged.shape:
        return None
    projections = [
        next((c.module for c in after if _is(c.state, state)), None) for state in stacked[1:]
    ]
    if None in projections or not projections:
        return None
    altup = AltUp(projections=tuple(module for module in projections if module is not None))
    with torch.no_grad():
        same = close(altup.merged(altup.flat(stacked.detach())), merged)
    return altup if same else None


def _is(value: object, state: Tensor) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.data_ptr() == state.data_ptr() and value.shape == state.shape
