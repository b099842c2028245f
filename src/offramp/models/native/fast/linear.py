"""Linear maps of a few rows, in the form that reads the weights fastest.

Decoding reads every weight once for a few tokens, so memory bandwidth is its limit. On a CPU the
usual form, a product of a vector and a matrix, stays far below it: MKL reads a matrix that is not
in the cache at half the bandwidth, and the bfloat16 kernels of oneDNN are slower still. In the
other order, weight (O, I) times columns (I, N), the float32 product of MKL for few columns comes
near the bandwidth, but it needs at least two columns.
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
"Bytes of weights that are too many for the processor's cache."


def few_columns_pay(weights: Tensor, total_bytes: int) -> bool:
    """Whether ``weight @ columns`` is the faster form for these weights: large, float32, MKL."""
    return (
        weights.dtype == torch.float32
        and weights.device.type == "cpu"
        and total_bytes >= _LARGE
        and torch.backends.mkl.is_available()
    )


def fast_linear(
    x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"], *, few_columns: bool
) -> Float[Tensor, "N O"]:
    """x weight^T. ``few_columns`` is what ``few_columns_pay`` said; the strides are not specified.

    Two and three columns give the same bits, so a token's state does not depend on how many
    tokens are decoded at once.
    """
    rows = len(x)
    if not few_columns or rows > FEW:
        return F.linear(x, weight)
    columns = torch.cat((x, x)) if rows == 1 else x.contiguous()
    return torch.mm(weight, columns.t()).t()[:rows]


@contextmanager
def native_bfloat16(x: Tensor, rows: int) -> Iterator[None]:
    """Within it, bfloat16 products of one or two rows run on PyTorch's own CPU kernels.

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
    """One weight for several linear maps of the same input, whose own weights become its parts.

    Nothing is stored twice, and a change in place of one is a change of the other.
    """
    with torch.inference_mode(linears[0].weight.is_inference()), torch.no_grad():
        whole = torch.cat([linear.weight.data for linear in linears])
        sizes = [linear.out_features for linear in linears]
        for linear, part in zip(linears, whole.split(sizes), strict=True):
            linear.weight.data = part
    return whole
