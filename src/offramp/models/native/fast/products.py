"""Products of a weight with the states of some tokens, by the compiled kernels.

The addresses of the tensors go to C, so each shape, type and place is checked here.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.errors import ConfigError
from offramp.models.checks import about, check_tensor
from offramp.models.native.quantised_weight import GROUP, QuantisedWeight

try:
    from offramp.models.native.fast import _few_tokens as _compiled
except ImportError:
    _compiled = None  # type: ignore[assignment]

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
"""Precisions of weights that are not quantised, of norms and of the cache."""
Weight = Tensor | QuantisedWeight
"""A weight in a form that the kernels may read."""
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, "int8": 2, "int4": 3}  # as in products.h
_AS_IT_IS, _NORMALISED, _GATED = range(3)
_RECORDS = {0: 0, 1: 4 * GROUP}  # bytes of a group of states that are prepared, as in products.h
_QUANTISED_RECORD = 2 * GROUP + 8  # as in quantised.h


def kernels_fit(weight: Weight) -> bool:
    """Return whether there are kernels for a weight, on a CPU."""
    if _compiled is None or not weight.is_cpu:
        return False
    return isinstance(weight, QuantisedWeight) or (
        weight.dtype in DTYPES and weight.is_contiguous()
    )


def multiplies_many(weight: Weight) -> bool:
    """Return whether the kernels' products with many tokens are the best for a weight they fit.

    For bfloat16 weights, those of PyTorch are better where the processor has AMX, and where the
    number of inputs is odd.
    """
    if isinstance(weight, QuantisedWeight):
        return True
    odd = weight.shape[-1] % 2 == 1
    if weight.dtype == torch.bfloat16 and (odd or torch.cpu._is_amx_tile_supported()):
        return False
    return bool(_compiled.many() >> format_of(weight) & 1)


def format_of(weight: Weight) -> int:
    """Return the number of a weight's format in the kernels."""
    return _FORMATS[weight.scheme if isinstance(weight, QuantisedWeight) else weight.dtype]


def addresses(weight: Weight) -> tuple[int, int, int]:
    """Return the addresses of a weight's values, scales and minimums; 0 for what it has not."""
    if not isinstance(weight, QuantisedWeight):
        return weight.data_ptr(), 0, 0
    least = weight.minimums
    return (
        weight.values.data_ptr(),
        weight.scales.data_ptr(),
        0 if least is None else least.data_ptr(),
    )


def scratch_of(weight: Weight, inputs: int) -> int:
    """Return how many numbers a product needs for each token beside its states."""
    record = _RECORDS.get(format_of(weight), _QUANTISED_RECORD)
    return inputs + -(-inputs // GROUP) * record // 4


def linear(
    x: Float[Tensor, "N _"],
    weight: Weight,
    *,
    norm: Float[Tensor, " I"] | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Float[Tensor, "N O"] | None = None,
) -> Float[Tensor, "N O"]:
    """Return f(x) weight^T + residual in float32.

    A token's result is independent of the others in calls of up to FEW_TOKENS (base.py), and with a
    quantised weight always.

    f is RMSNorm if there is a ``norm``; if ``gated``, x is (N, 2 I) and f is SiLU of its first
    half times the second half. With a bfloat16 weight f(x) is rounded to bfloat16, with a quantised
    one to 15 bits in groups of 32.
    """
    if not isinstance(weight, QuantisedWeight) and (
        weight.dim() != 2 or weight.dtype not in DTYPES or not weight.is_contiguous()
    ):
        raise ConfigError(f"weight: expected what a kernel can read, got {about(weight)}")
    outputs, inputs = weight.shape
    tokens = x.shape[0] if x.dim() else 0
    wide = 2 * inputs if gated else inputs
    if x.shape != (tokens, wide) or x.dtype != torch.float32 or not (x.is_cpu and weight.is_cpu):
        if not weight.is_cpu:
            raise ConfigError(f"weight: expected on cpu, got {weight.device}")
        check_tensor("x", x, (tokens, wide), torch.float32, CPU)
    x = x.contiguous()
    dtype = torch.float32
    if norm is not None:
        dtype = _norm_dtype(weight, norm)
        norm = norm.to(dtype).contiguous()
        if norm.shape != (inputs,) or not norm.is_cpu:
            check_tensor("norm", norm, (inputs,), dtype, CPU)
    if residual is not None:
        check_tensor("residual", residual, (tokens, outputs), torch.float32, CPU)
        residual = residual.contiguous()
    before = _GATED if gated else _AS_IT_IS if norm is None else _NORMALISED
    out = torch.empty(tokens, outputs, dtype=torch.float32)
    scratch = torch.empty(tokens * scratch_of(weight, inputs), dtype=torch.float32)
    _compiled.linear(
        x.data_ptr(),
        addresses(weight),
        format_of(weight),
        out.data_ptr(),
        tokens,
        inputs,
        outputs,
        before,
        0 if norm is None else norm.data_ptr(),
        dtype == torch.bfloat16,
        eps,
        0 if residual is None else residual.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def prepared(
    x: Float[Tensor, "N _"],
    dtype: torch.dtype,
    *,
    norm: Float[Tensor, " I"] | None = None,
    eps: float = 0.0,
) -> Float[Tensor, "N I"]:
    """Return what a product of many tokens multiplies, in ``dtype``.

    It is RMSNorm of x (N, I), or without a ``norm`` SiLU of the first half of x (N, 2 I) times the
    second half. Every tensor is in float32 or bfloat16.
    """
    parts = 1 if norm is not None else 2
    inputs = x.shape[-1] // parts if x.dim() else 0
    fits = x.dim() == 2 and x.shape[1] == parts * inputs and x.is_cpu
    if not fits or x.dtype not in DTYPES or dtype not in DTYPES:
        expected = f"float32 or bfloat16 of shape (N, {parts * inputs})"
        raise ConfigError(f"x: expected {expected} on cpu, got {about(x)}")
    x = x.contiguous()
    if norm is not None:
        norm = norm.to(_readable(norm)).contiguous()
        check_tensor("norm", norm, (inputs,), norm.dtype, CPU)
    out = torch.empty(len(x), inputs, dtype=dtype)
    _compiled.prepare(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        0 if norm is None else norm.data_ptr(),
        norm is not None and norm.dtype == torch.bfloat16,
        eps,
        out.data_ptr(),
        dtype == torch.bfloat16,
        len(x),
        inputs,
        torch.get_num_threads(),
    )
    return out


def _norm_dtype(weight: Weight, norm: Tensor) -> torch.dtype:
    """Return the precision in which a product reads its norm: the weight's, if it has one."""
    return _readable(norm) if isinstance(weight, QuantisedWeight) else weight.dtype


def _readable(norm: Tensor) -> torch.dtype:
    return norm.dtype if norm.dtype in DTYPES else torch.float32
