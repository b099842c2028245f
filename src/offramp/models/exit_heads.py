"""Exit heads: the layers between the state at an exit and its logits.

- ``shared``: the final norm and the LM head; the exit has no parameters of its own.
- ``norm``: its own norm, and the shared LM head.
- ``adapter``: its own norm and small residual block, and the shared LM head.
- ``full``: its own norm and LM head.
- ``specialist``: its own norm, residual block (hidden units: half the model's width) and LM head.

New heads of all kinds start out equal to ``shared`` in a pretrained model: the norm and the LM
head are copies of the final ones, and the residual block adds zero.
"""

import warnings
from typing import Any, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from offramp.models.head_kinds import ExitHeadKind


class UntrainedExitsWarning(UserWarning):
    """An exit is used that was not trained."""


class ExitAdapter(nn.Module):
    """Residual block x + A x + SwiGLU(x) on a normalised state; initially the identity.

    A is the translator of the tuned lens (Belrose et al. 2023, arXiv 2303.08112), which has a
    least-squares solution; the SwiGLU with ``units`` hidden units adds nonlinear terms. Without
    ``direct`` there is no A.
    """

    def __init__(self, hidden_size: int, units: int, *, direct: bool) -> None:
        super().__init__()
        self.direct_proj = nn.Linear(hidden_size, hidden_size, bias=False) if direct else None
        self.gate_proj = nn.Linear(hidden_size, units, bias=False)
        self.up_proj = nn.Linear(hidden_size, units, bias=False)
        self.down_proj = nn.Linear(units, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the input weights, and set the output weights to zero."""
        for projection in (self.gate_proj, self.up_proj):
            nn.init.trunc_normal_(projection.weight, std=projection.in_features**-0.5)
        self.add_nothing()

    def add_nothing(self) -> None:
        """Make the block the identity."""
        if self.direct_proj is not None:
            nn.init.zeros_(self.direct_proj.weight)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Return the state for the LM head, in place of the final layer's state."""
        out: Tensor = x if self.direct_proj is None else x + self.direct_proj(x)
        out = out + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def adapter_of(kind: ExitHeadKind, hidden_size: int) -> ExitAdapter | None:
    """Make the residual block of a head of this kind; None if it has none."""
    if kind == "adapter":
        return ExitAdapter(hidden_size, hidden_size, direct=True)
    if kind == "specialist":
        return ExitAdapter(hidden_size, max(1, hidden_size // 2), direct=False)
    return None


def has_lm_head(kind: ExitHeadKind) -> bool:
    """Return whether an exit head of this kind has its own LM head."""
    return kind in ("full", "specialist")


class ExitHead(nn.Module):
    """An exit's own norm and, by its kind, its residual block or its LM head."""

    def __init__(
        self,
        *,
        norm: nn.Module,
        adapter: ExitAdapter | None = None,
        lm_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.adapter = adapter
        self.lm_head: Any = lm_head

    def start_from(self, norm: nn.Module, lm_head: nn.Module) -> None:
        """Copy the final norm and LM head, so that the exit gives the same logits."""
        self.norm.load_state_dict(norm.state_dict())
        if self.adapter is not None:
            self.adapter.reset_parameters()
        if self.lm_head is not None:
            self.lm_head.load_state_dict(lm_head.state_dict())

    def forward(self, h: Float[Tensor, "*B S"]) -> Float[Tensor, "*B D"]:
        """Return the state for the LM head; a norm may make it narrower than a state."""
        x: Tensor = self.norm(h)
        return x if self.adapter is None else cast(Tensor, self.adapter(x))


class ExitHeads(nn.ModuleDict):
    """The exits' own heads by layer, and whether the exits (of any kind) were trained."""

    def __init__(self, *, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.warned = False
        "Whether the warning about untrained exits was given, or is not wanted."
        self.trained = True
        "Whether the exits were trained; if not, the first use of one in eval mode warns."

    def start_from(self, old: "ExitHeads", norm: nn.Module | None, lm_head: nn.Module) -> None:
        """Copy the heads in ``old`` that have the same parts, and initialise the others.

        A new head begins with the exit's norm in ``old``, or else ``norm``, and with ``lm_head``.
        The exits count as trained if the old ones did.
        """
        for layer, head in self.items():
            before = cast(ExitHead, old[layer]) if layer in old else None
            if before is not None and before.state_dict().keys() == head.state_dict().keys():
                head.load_state_dict(before.state_dict())
                continue
            first = norm if before is None else before.norm
            assert first is not None
            cast(ExitHead, head).start_from(first, lm_head)
        self.trained = old.trained

    def at(self, layer: int) -> ExitHead | None:
        """Return the exit's own head at a layer; None if it has none."""
        silent = self.trained or self.warned or self.training or layer == self.num_layers
        if not silent:
            self.warned = True
            warnings.warn(
                f"the exit at layer {layer} was never trained by offramp, so its predictions are "
                "poor unless the checkpoint itself was trained with exits, as LayerSkip's are",
                UntrainedExitsWarning,
                stacklevel=3,
            )
        return cast(ExitHead, self[str(layer)]) if str(layer) in self else None

    def head_at(self, layer: int, norm: nn.Module, lm_head: nn.Module) -> tuple[nn.Module, Any]:
        """Return an exit's norm (or own head, with its adapter) and the weight of its LM head.

        ``norm`` and ``lm_head`` are the final ones, for exits without their own.
        """
        own = self.at(layer)
        head: Any = lm_head if own is None or own.lm_head is None else own.lm_head
        return norm if own is None else own, head.weight
