"""Linear layers whose weights have 8 or 4 bits; quantised_weight.py describes the weights."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.models.checks import about
from offramp.models.native.fast import products
from offramp.models.native.quantised_weight import (
    GROUP,
    ROWS,
    TENSORS,
    QuantisedWeight,
    blocked,
    concatenated,
    packed,
    tensor_forms,
)
from offramp.models.native.schemes import SCHEMES

__all__ = [
    "SCHEMES",
    "QuantisedLinear",
    "QuantisedWeight",
    "concatenated",
    "linear",
    "quantise_weight",
    "quantised_linear",
]

_CACHED = 1 << 17
"""Weights that are quantised at once, so that they stay in the processor's cache."""
_CHUNK = 1 << 22
"""Weights that are computed at once, so that little memory is needed beside the result."""


@torch.no_grad()
def quantise_weight(weight: Float[Tensor, "O I"], scheme: str) -> QuantisedWeight:
    """Quantise a matrix: ``int8`` rounds to the nearest, ``int4`` minimises the squared error.

    Weights that come from Q4_1 of llama.cpp, in the same groups, keep their values in ``int4``.
    Raises a ConfigError for numbers that are not finite, or too large for float16 scales.
    """
    forms = tensor_forms(scheme, tuple(weight.shape))  # type: ignore[arg-type]
    made = {
        name: torch.empty(shape, dtype=dtype, device=weight.device)
        for name, (shape, dtype) in forms.items()
    }
    outputs, inputs = weight.shape
    step = max(1, _CACHED // (inputs * ROWS)) * ROWS
    for first in range(0, outputs, step):
        part = weight[first : first + step].float()
        found = _int8(part) if scheme == "int8" else _int4(part)
        start = first // ROWS
        for name, tensor in found.items():
            made[name][start : start + len(tensor)] = tensor
    return QuantisedWeight.of(made, scheme=scheme, shape=(outputs, inputs))


class QuantisedLinear(nn.Module):
    """A linear map without bias whose weight has 8 or 4 bits; it takes no gradients.

    The tensors are buffers with the names of a ``QuantisedWeight``, so ``state_dict`` holds them.
    They keep their types when the model changes its precision. ``values`` of a new layer are not
    set; ``of`` makes a layer of a weight.
    """

    def __init__(self, in_features: int, out_features: int, scheme: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self._weight: QuantisedWeight | None = None
        for name, (shape, dtype) in tensor_forms(scheme, (out_features, in_features)).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    @classmethod
    def of(cls, weight: QuantisedWeight) -> "QuantisedLinear":
        """Return a layer that holds this weight."""
        with torch.device("meta"):
            layer = cls(weight.shape[1], weight.shape[0], weight.scheme)
        layer.weight = weight
        return layer

    @property
    def weight(self) -> QuantisedWeight:
        """The weight; it shares the buffers."""
        held = [self._buffers.get(name) for name in TENSORS]
        kept = self._weight
        if kept is None or any(
            getattr(kept, n) is not t for n, t in zip(TENSORS, held, strict=True)
        ):
            tensors = {n: t for n, t in zip(TENSORS, held, strict=True) if t is not None}
            shape = (self.out_features, self.in_features)
            kept = self._weight = QuantisedWeight(scheme=self.scheme, shape=shape, **tensors)
        return kept

    @weight.setter
    def weight(self, weight: QuantisedWeight) -> None:
        for name, tensor in weight.tensors().items():
            self._buffers[name] = tensor

    def __getstate__(self) -> dict[str, Any]:
        """Drop the weight, which a copy makes of its own buffers."""
        return {**vars(self), "_weight": None}

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """Return x weight^T in the precision of x."""
        return quantised_linear(x, self.weight)

    def extra_repr(self) -> str:
        """Return the layer's shape and scheme, for ``print``."""
        return f"{self.in_features}, {self.out_features}, {self.scheme}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantisedLinear":
        """Move the buffers; their types are part of the scheme and stay."""
        for name, tensor in self._buffers.items():
            if tensor is not None:
                moved = fn(tensor)
                same = moved.dtype == tensor.dtype
                self._buffers[name] = moved if same else tensor.to(moved.device)
        return self


def linear(x: Float[Tensor, "*N I"], weight: Any) -> Float[Tensor, "*N O"]:
    """Return x weight^T for a weight of any form."""
    if isinstance(weight, QuantisedWeight):
        return quantised_linear(x, weight)
    return F.linear(x, weight)


def quantised_linear(x: Float[Tensor, "*N I"], weight: QuantisedWeight) -> Float[Tensor, "*N O"]:
    """Return x weight^T in the precision of x.

    On a CPU without gradients the compiled kernels compute it, if they were built: states are
    rounded to 15 bits in groups of 32, and a token's result is independent of the others. Otherwise
    the weights become numbers of x's precision, some rows at a time, so that memory stays bounded.
    """
    outputs, inputs = weight.shape
    if x.shape[-1:] != (inputs,) or not x.is_floating_point():
        raise ConfigError(f"x: expected floats of shape (..., {inputs}), got {about(x)}")
    if products.kernels_fit(weight) and x.is_cpu and not torch.is_grad_enabled():
        flat = products.linear(x.reshape(-1, inputs).float(), weight)
        return flat.view(*x.shape[:-1], outputs).to(x.dtype)
    step = max(1, _CHUNK // (inputs * ROWS)) * ROWS
    parts = [
        F.linear(x, weight.dequantised(x.dtype, first=first, last=first + step))
        for first in range(0, outputs, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _int8(weight: Float[Tensor, "O I"]) -> dict[str, Tensor]:
    outputs, inputs = weight.shape
    groups = F.pad(weight, (0, -inputs % GROUP)).view(outputs, -1, GROUP)
    scale = (groups.abs().amax(dim=-1) / 127).half()
    wide = scale.float()[..., None]
    codes = (groups / wide.where(wide > 0, 1)).round_().clamp_(-127, 127) + 128
    chunks = packed(codes.nan_to_num_().to(torch.uint8).view(outputs, -1), 128)
    return {"values": chunks.flatten(1), "scales": blocked(scale)}


def _int4(weight: Float[Tensor, "O I"]) -> dict[str, Tensor]:
    outputs, inputs = weight.shape
    missing = -inputs % GROUP
    if missing:  # the last weight again changes neither the largest nor the smallest
        weight = torch.cat((weight, weight[:, -1:].expand(-1, missing)), dim=1)
    groups = weight.view(outputs, -1, GROUP)
    scale, minimum, codes = _fit(groups)
    chunks = packed(codes.view(outputs, -1), 0)
    return {
        "values": (chunks[:, :, :4] | chunks[:, :, 4:] << 4).flatten(1),
        "scales": blocked(scale),
        "minimums": blocked(minimum),
    }


def _fit(groups: Float[Tensor, "O G 32"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale and minimum (O, G) in float16 and codes (O, G, 32) of small squared error.

    The smallest and largest weight give the first fit. Then the codes give the scale and the
    minimum by least squares, and these give new codes; the best fit of each group is kept.
    """
    least, most = groups.aminmax(dim=-1)
    best: tuple[Tensor, ...] = ()
    scale, minimum = (most - least) / 15, least
    for _ in range(3):
        scale, minimum = scale.half(), minimum.half()
        wide, low = scale.float()[..., None], minimum.float()[..., None]
        codes = ((groups - low) / wide.where(wide > 0, 1)).round_().clamp_(0, 15)
        error = (codes * wide + low - groups).square_().sum(dim=-1)
        if not best:
            best = (scale, minimum, codes, error)
        else:
            better = error < best[3]
            best = tuple(
                new.where(better[..., None] if new.dim() == 3 else better, old)
                for new, old in zip((scale, minimum, codes, error), best, strict=True)
            )
        mean, middle = groups.mean(dim=-1), codes.mean(dim=-1)
        spread = (codes - middle[..., None]).square().sum(dim=-1)
        together = ((codes - middle[..., None]) * groups).sum(dim=-1)
        scale = together / spread.where(spread > 0, 1)
        minimum = mean - scale * middle
    scale, minimum, codes, _ = best
    return scale, minimum, codes.nan_to_num_().to(torch.uint8)
