"""The weights of a model's blocks in the form of the compiled kernels."""

from collections.abc import Sequence
from typing import Any

import torch

from offramp.errors import ConfigError
from offramp.models.checks import about, check_tensor
from offramp.models.huge_pages import use_huge_pages
from offramp.models.native.fast.products import (
    CPU,
    DTYPES,
    Weight,
    addresses,
    format_of,
    scratch_of,
)
from offramp.models.native.quantised_weight import QuantisedWeight


class KernelWeights:
    """The weights of all blocks, checked once, in the form of the kernels.

    ``blocks`` holds for each block its fused queries, keys and values ((H + 2 H_kv) Dh, D), output
    (D, H Dh), fused gate and up (2 U, D), down (D, U) and two norms (D). The matrices have one
    format; if they are quantised, the norms say the precision of the cache and of states. Only the
    first ``cache_layers`` blocks have keys and values of their own (None: all blocks); the others
    have only queries (H Dh, D), and may have another number of hidden units U. With ``post`` the
    norms are after the sublayers. Raises a ConfigError for weights that the kernels cannot read.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Any]],
        *,
        head_dim: int,
        eps: float,
        post: bool,
        cache_layers: int | None = None,
    ) -> None:
        self.count, self.size, self.eps, self.post = len(blocks), head_dim, eps, post
        if not blocks or any(len(of) != 6 for of in blocks):
            raise ConfigError("blocks: expected at least one, of six weights each")
        self.cache_layers = self.count if cache_layers is None else cache_layers
        if not 1 <= self.cache_layers <= self.count:
            raise ConfigError(f"cache_layers: expected 1 to {self.count}, got {cache_layers}")
        qkv, out, _, down, norm, _ = blocks[0]
        self.dtype = norm.dtype
        shaped = all(len(weight.shape) == 2 for weight in (qkv, out, down))
        if head_dim < 1 or self.dtype not in DTYPES or not shaped:
            raise ConfigError(f"weights: expected what the kernels can read, got {about(norm)}")
        scheme = qkv.scheme if isinstance(qkv, QuantisedWeight) else None
        self.hidden, self.units, self.heads = out.shape[0], down.shape[1], out.shape[1] // head_dim
        self.kv_heads = (qkv.shape[0] // head_dim - self.heads) // 2
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ConfigError(
                f"weights: expected heads in groups of one size, got {self.heads} heads and "
                f"{self.kv_heads} key and value heads"
            )
        attended, kept = self.heads * head_dim, 2 * self.kv_heads * head_dim
        upper = blocks[min(self.cache_layers, self.count - 1)][3]  # checked below
        self.upper_units = upper.shape[-1] if len(upper.shape) else 0
        own, queries = (
            (
                (outputs, self.hidden),
                (self.hidden, attended),
                (2 * units, self.hidden),
                (self.hidden, units),
                (self.hidden,),
                (self.hidden,),
            )
            for outputs, units in ((attended + kept, self.units), (attended, self.upper_units))
        )
        for layer, of in enumerate(blocks):
            shapes = own if layer < self.cache_layers else queries
            for weight, shape in zip(of, shapes, strict=True):
                self._check(weight, shape, scheme)
        self.format = format_of(qkv)
        most = max(self.units, self.upper_units)
        scratch = scratch_of(qkv, max(self.hidden, most, attended))
        self.room = 2 * attended + kept + self.hidden + 2 * most + scratch
        "How many numbers a call of some blocks keeps for each token while it runs."
        self._held = [list(of) for of in blocks]  # so that they stay
        use_huge_pages(tensor for of in blocks for weight in of for tensor in _tensors(weight))
        self._table = torch.tensor([_row(*of) for of in blocks])

    def at(self, layer: int) -> int:
        """Return the address of the addresses of a block's weights."""
        return self._table.data_ptr() + 8 * self._table.shape[1] * layer

    def _check(self, weight: Weight, shape: tuple[int, ...], scheme: str | None) -> None:
        if len(shape) == 1 or scheme is None:
            if isinstance(weight, QuantisedWeight):
                raise ConfigError(f"weight: expected {self.dtype}, got {weight.scheme}")
            check_tensor("weight", weight, shape, self.dtype, CPU, contiguous=True)
            return
        got = getattr(weight, "scheme", None)
        if got != scheme or weight.shape != shape or not weight.is_cpu:
            raise ConfigError(
                f"weight: expected {scheme} of shape {shape} on cpu, got {got} of shape "
                f"{tuple(weight.shape)} on {weight.device}"
            )


def _tensors(weight: Weight) -> list[torch.Tensor]:
    return list(weight.tensors().values()) if isinstance(weight, QuantisedWeight) else [weight]


def _row(*of: Any) -> list[int]:
    """Return the addresses of a block's weights in the order of ``Weights`` in the C code."""
    *matrices, first, second = of
    found = [address for weight in matrices for address in addresses(weight)]
    return [*found, first.data_ptr(), second.data_ptr()]
