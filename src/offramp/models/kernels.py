"""Products and attention of a few tokens by the compiled kernels, where they were built.

``_few_tokens.c`` is compiled when offramp is installed, if there is a C compiler with OpenMP.
Where there was none, ``fast_step.py`` does the same with PyTorch alone, more slowly.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

try:
    from offramp.models import _few_tokens as _compiled
except ImportError:
    _compiled = None  # type: ignore[assignment]

_LANES, _LARGEST_HEAD = 8, 256  # as in _few_tokens.c
_AS_IT_IS, _NORMALISED, _GATED = range(3)


def kernels_fit(weight: Tensor, head_dim: int) -> bool:
    """Whether there are kernels for these weights, on a CPU."""
    return (
        _compiled is not None
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.is_contiguous()
        and head_dim % _LANES == 0
        and head_dim <= _LARGEST_HEAD
    )


def linear(
    x: Float[Tensor, "N _"],
    weight: Float[Tensor, "O I"],
    *,
    norm: Float[Tensor, " I"] | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Float[Tensor, "N O"] | None = None,
) -> Float[Tensor, "N O"]:
    """f(x) weight^T + residual, float32; what a token gets does not depend on the others.

    f is RMSNorm if there is a ``norm``; if ``gated``, x is (N, 2 I) and f is SiLU of its first
    half times the second.
    """
    x = x.contiguous()
    outputs, inputs = weight.shape
    tokens = x.shape[0]
    assert weight.is_contiguous()
    assert x.dtype == torch.float32
    assert x.shape[1] == inputs * (1 + gated)
    if norm is not None:
        norm = norm.to(weight.dtype).contiguous()
        assert norm.shape[0] == inputs
    if residual is not None:
        residual = residual.contiguous()
        assert residual.dtype == torch.float32
        assert residual.shape == (tokens, outputs)
    before = _GATED if gated else _AS_IT_IS if norm is None else _NORMALISED
    out = torch.empty(tokens, outputs, dtype=torch.float32)
    scratch = None if before == _AS_IT_IS else torch.empty(tokens, inputs, dtype=torch.float32)
    _compiled.linear(
        x.data_ptr(),
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        out.data_ptr(),
        tokens,
        inputs,
        outputs,
        before,
        0 if norm is None else norm.data_ptr(),
        eps,
        0 if residual is None else residual.data_ptr(),
        0 if scratch is None else scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def attention(
    *,
    cos: Float[Tensor, "N Dh"],
    sin: Float[Tensor, "N Dh"],
    slots: Int[Tensor, " N"],
    rows: Int[Tensor, " N"],
    capacity: int,
    kv_heads: int,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What turns queries, keys and values (N, (H + 2 H_kv) Dh) into attended values (N, H Dh).

    It rotates by ``cos`` and ``sin`` (whose first half is negated), stores the keys and values
    in a layer's cache (rows, H_kv, capacity, Dh) at each token's slot of its row, and attends to
    every slot up to there. Without queries (H = 0) it stores only.
    """
    tokens, head_dim = cos.shape
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    slots, rows = slots.long().contiguous(), rows.long().contiguous()
    threads = torch.get_num_threads()
    scores = cos.new_empty(threads, capacity + _LANES)

    def attend(qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads = qkv.shape[1] // head_dim - 2 * kv_heads
        assert qkv.is_contiguous()
        assert keys.shape == values.shape
        assert keys.shape[1:] == (kv_heads, capacity, head_dim)
        assert keys.dtype == values.dtype
        assert keys.dtype in (torch.float32, torch.bfloat16)
        out = qkv.new_empty(tokens, heads * head_dim)
        _compiled.attend(
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            keys.dtype == torch.bfloat16,
            slots.data_ptr(),
            rows.data_ptr(),
            out.data_ptr(),
            scores.data_ptr(),
            tokens,
            heads,
            kv_heads,
            head_dim,
            capacity,
            threads,
        )
        return out

    return attend
