"""What stands between a layer's state and its logits.

- ``shared``: the final norm and the LM head (no parameters of its own);
- ``norm``: a norm of its own, the shared LM head;
- ``adapter``: a norm and a small residual block of its own, the shared LM head;
- ``full``: a norm and an LM head of its own;
- ``specialist``: a norm, a residual block half as wide inside as the model, and an LM head of
  its own.

A new head of any kind but ``shared`` in a pretrained model says what ``shared`` would: its norm
and its LM head are copies of the final ones, its residual block adds nothing.
"""

import warnings
from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from offramp.models.head_kinds import ExitHeadKind


class UntrainedExitsWarning(UserWarning):
    """The model is asked to leave at exits that nobody has trained."""


class ExitAdapter(nn.Module):
    """x + A x + SwiGLU(x) on a normalised state; begins as x.

    A is the translator of the tuned lens (Belrose et al. 2023, arXiv 2303.08112), which can be
    had by least squares; the SwiGLU, with so many ``units``, learns what a linear map cannot.
    Without ``direct`` there is no A.
    """

    def __init__(self, hidden_size: int, units: int, *, direct: bool) -> None:
        super().__init__()
        self.direct_proj = nn.Linear(hidden_size, hidden_size, bias=False) if direct else None
        self.gate_proj = nn.Linear(hidden_size, units, bias=False)
        self.up_proj = nn.Linear(hidden_size, units, bias=False)
        self.down_proj = nn.Linear(units, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw what is read, and add nothing yet."""
        for projection in (self.gate_proj, self.up_proj):
            nn.init.trunc_normal_(projection.weight, std=projection.in_features**-0.5)
        self.add_nothing()

    def add_nothing(self) -> None:
        """Let the block be the identity."""
        if self.direct_proj is not None:
            nn.init.zeros_(self.direct_proj.weight)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What the LM head reads, in the final layer's stead."""
        out: Tensor = x if self.direct_proj is None else x + self.direct_proj(x)
        out = out + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def adapter_of(kind: ExitHeadKind, hidden_size: int) -> ExitAdapter | None:
    """The residual block of a head of this kind, if it has one."""
    if kind == "adapter":
        return ExitAdapter(hidden_size, hidden_size, direct=True)
    if kind == "specialist":
        return ExitAdapter(hidden_size, max(1, hidden_size // 2), direct=False)
    return None


def has_lm_head(kind: ExitHeadKind) -> bool:
    """Whether a head of this kind has an LM head of its own."""
    return kind in ("full", "specialist")


class ExitHead(nn.Module):
    """An exit's own norm and, by its kind, its residual block or its LM head."""

    def __init__(
        self,
        *,
        norm: nn.Module,
        adapter: ExitAdapter | None = None,
        lm_head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.adapter = adapter
        self.lm_head = lm_head

    def start_from(self, norm: nn.Module, lm_head: nn.Linear) -> None:
        """Say what the final norm and LM head say, by copies of their parameters."""
        self.norm.load_state_dict(norm.state_dict())
        if self.adapter is not None:
            self.adapter.reset_parameters()
        if self.lm_head is not None:
            self.lm_head.load_state_dict(lm_head.state_dict())

    def forward(self, h: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The state that the LM head reads."""
        x: Tensor = self.norm(h)
        return x if self.adapter is None else cast(Tensor, self.adapter(x))


class ExitHeads(nn.ModuleDict):
    """The exits' own heads, by layer, and whether any exit (``shared`` ones too) was trained."""

    def __init__(self, *, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.warned = False
        "True: no (further) warning of untrained exits is given."
        self.trained = True
        "False: the first use of an exit below the last layer in eval mode gives a warning."

    def start_from(self, old: "ExitHeads", norm: nn.Module | None, lm_head: nn.Linear) -> None:
        """Let each head begin with the norm that the exit had in ``old``, or else with ``norm``,
        and with ``lm_head``; the exits count as trained where the old ones did.
        """
        for layer, head in self.items():
            before = cast(ExitHead, old[layer]).norm if layer in old else norm
            assert before is not None
            cast(ExitHead, head).start_from(before, lm_head)
        self.trained = old.trained

    def at(self, layer: int) -> ExitHead | None:
        """The head of a layer, or None where it has none of its own."""
        silent = self.trained or self.warned or self.training or layer == self.num_layers
        if not silent:
            self.warned = True
            warnings.warn(
                f"the exit at layer {layer} was never trained: what it says is not what it could",
                UntrainedExitsWarning,
                stacklevel=3,
            )
        return cast(ExitHead, self[str(layer)]) if str(layer) in self else None
