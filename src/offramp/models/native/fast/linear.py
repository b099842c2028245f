"""Linear maps of a few rows, in the form that reads the weights fastest.

Decoding reads every weight once for a few tokens, so memory bandwidth limits its speed. On a CPU
the usual form, vector times matrix, is far from this limit: MKL reads a matrix that is not in the
cache at half the bandwidth, and the bfloat16 kernels of oneDNN are even slower. In the other
order, weight (O, I) times columns (I, N), MKL's float32 product for few columns is close to the
limit, but it needs at least two columns.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FEW = 4
"Largest number of columns for which this order is faster."
_LARGE = 1 << 25
"Size of weights, in bytes, that is too large for the processor's cache."


def few_columns_pay(weights: Tensor, total_bytes: int) -> bool:
    """Return whether ``weight @ columns`` is faster for these weights: large, float32, MKL."""
    return (
        weights.dtype == torch.float32
        and weights.device.type == "cpu"
        and total_bytes >= _LARGE
        and torch.backends.mkl.is_available()
    )


def fast_linear(
    x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"], *, few_columns: bool
) -> Float[Tensor, "N O"]:
    """Return x weight^T; its strides are not specified.

    ``few_columns`` is the result of ``few_columns_pay``. Two and three columns give the same
    bits, so a token's state does not depend on how many tokens are decoded at once.
    """
    rows = len(x)
    if not few_columns or rows > FEW:
        return F.linear(x, weight)
    columns = torch.cat((x, x)) if rows == 1 else x.contiguous()
    return torch.mm(weight, columns.t()).t()[:rows]


def input_of(
    x: Float[Tensor, "N _"], *, norm: Float[Tensor, " I"] | None, eps: float, gated: bool
) -> Float[Tensor, "N I"]:
    """Return what a product multiplies: RMSNorm of x, SwiGLU of its halves, or x."""
    if norm is not None:
        return F.rms_norm(x, x.shape[-1:], norm, eps)
    if not gated:
        return x
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@contextmanager
def native_bfloat16(x: Tensor, rows: int) -> Iterator[None]:
    """Run bfloat16 products of one or two rows on PyTorch's own CPU kernels in this context.

    For so few rows they are two to three times as fast as those of oneDNN, except with Intel AMX.
    """
    slow = (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and rows <= 2
        and torch._C._get_mkldnn_enabled()
        and not torch.cpu._is_amx_tile_supported()
    )
    if not slow:
        yield
        return
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


def fuse(linears: Sequence[nn.Linear]) -> Float[Tensor, "O I"]:
    """Fuse the weights of several linear maps of the same input; their weights become views of it.

    Nothing is stored twice, and an in-place change of one changes the other.
    """
    with torch.inference_mode(linears[0].weight.is_inference()), torch.no_grad():
        whole = torch.cat([linear.weight.data for linear in linears])
        sizes = [linear.out_features for linear in linears]
        for linear, part in zip(linears, whole.split(sizes), strict=True):
            linear.weight.data = part
    return whole
