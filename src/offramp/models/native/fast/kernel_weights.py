"""The weights of a model's blocks in the form of the compiled kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.errors import ConfigError
from offramp.models.checks import about, check_tensor

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
"""Precisions of weights and of the cache that the kernels read."""


class KernelWeights:
    """The weights of all blocks, checked once, in the form of the kernels.

    ``blocks`` holds for each block its fused queries, keys and values ((H + 2 H_kv) Dh, D), output
    (D, H Dh), fused gate and up (2 U, D), down (D, U) and two norms (D). Only the first
    ``cache_layers`` blocks have keys and values of their own (None: all blocks); the others have
    only queries (H Dh, D), and may have another number of hidden units U. With ``post`` the norms
    are after the sublayers. Raises a ConfigError for weights that the kernels cannot read.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Tensor]],
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
        qkv, out, _, down, _, _ = blocks[0]
        self.dtype = qkv.dtype
        if head_dim < 1 or self.dtype not in DTYPES or {w.dim() for w in (qkv, out, down)} != {2}:
            raise ConfigError(f"weights: expected what the kernels can read, got {about(qkv)}")
        self.hidden, self.units, self.heads = out.shape[0], down.shape[1], out.shape[1] // head_dim
        self.kv_heads = (qkv.shape[0] // head_dim - self.heads) // 2
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ConfigError(
                f"weights: expected heads in groups of one size, got {self.heads} heads and "
                f"{self.kv_heads} key and value heads"
            )
        attended, kept = self.heads * head_dim, 2 * self.kv_heads * head_dim
        upper = blocks[min(self.cache_layers, self.count - 1)][3]  # checked below
        self.upper_units = upper.shape[-1] if upper.dim() else 0
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
                check_tensor("weight", weight, shape, self.dtype, CPU, contiguous=True)
        most = max(self.units, self.upper_units)
        self.room = 2 * attended + kept + self.hidden + 2 * most + max(self.hidden, most)
        "How many numbers a call of some blocks keeps for each token while it runs."
        self._held = [[weight.detach() for weight in of] for of in blocks]  # so that they stay
        self._table = torch.tensor([[weight.data_ptr() for weight in of] for of in self._held])

    def at(self, layer: int) -> int:
        """Return the address of the addresses of a block's weights."""
        return self._table.data_ptr() + 8 * 6 * layer
