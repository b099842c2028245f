"""Linear maps of a few rows, in the form in which the weights are read fastest.

Decoding reads every weight once for a handful of tokens, so it can be as fast as the memory. On
a CPU the usual form, a product of a vector and a matrix, is far from it: MKL's reads a matrix
that is not in the cache at half the memory's speed, and oneDNN's bfloat16 kernels are slower
still. Written the other way round, weight (O, I) times columns (I, N), MKL's float32 product for
few columns is near the memory's speed, but it wants two columns at least.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FEW = 4
"Most columns for which the form for few pays."
_LARGE = 1 << 25
"Bytes of weights that no cache holds from one token to the next."


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
    """x weight^T; ``few_columns``: see ``few_columns_pay``. The result may have any strides.

    Two and three columns are multiplied alike, bit for bit, so a token's state does not depend
    on how many are decoded at once.
    """
    rows = len(x)
    if not few_columns or rows > FEW:
        return F.linear(x, weight)
    columns = torch.cat((x, x)) if rows == 1 else x.contiguous()
    return torch.mm(weight, columns.t()).t()[:rows]


@contextmanager
def native_bfloat16(x: Tensor, rows: int) -> Iterator[None]:
    """Inside, bfloat16 products of one or two rows run on PyTorch's own CPU kernels.

    They are two to three times as fast as oneDNN's for so few, except with Intel's AMX.
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
    """One weight for several linear maps of the same input; theirs become its parts.

    So nothing is stored twice, and what changes one in place changes the other.
    """
    with torch.inference_mode(linears[0].weight.is_inference()), torch.no_grad():
        whole = torch.cat([linear.weight.data for linear in linears])
        sizes = [linear.out_features for linear in linears]
        for linear, part in zip(linears, whole.split(sizes), strict=True):
            linear.weight.data = part
    return whole
