"""Weights of 8 and 4 bits, and the order in which they are stored.

Each group of 32 inputs of a row has a float16 scale:

- ``int8``: symmetric, as Q8_0 of llama.cpp: w = scale (code - 128), codes 1 to 255.
- ``int4``: with a float16 minimum, as Q4_1 of llama.cpp: w = scale code + minimum, codes 0 to 15.

Codes are stored in the order in which the compiled kernels read them: blocks of 16 rows, in them
groups of 32 inputs, in them eight chunks of 4 inputs, in them the 16 rows. So one register holds 4
inputs of 16 rows, and a group's sum for 16 rows needs no shuffle. A byte holds one code of 8 bits,
or two of 4 bits: that of chunk c in its low half and that of chunk c + 4 in its high half. Missing
rows and inputs at the ends are zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from offramp.errors import ConfigError
from offramp.models.checks import check_tensor
from offramp.models.native.schemes import SCHEMES

ROWS, GROUP = 16, 32
"""Rows of a block and inputs of a group."""
TENSORS = ("values", "scales", "minimums")
"""Names of a weight's tensors."""


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantisedWeight:
    """A matrix (O, I) in 8 or 4 bits; the module's docstring describes the order.

    With B blocks of 16 rows and G groups of 32 inputs, ``values`` are uint8, (B, 512 G) for
    ``int8`` and (B, 256 G) for ``int4``. ``scales`` are float16, (B, G, 16), and so are the
    ``minimums`` of ``int4``; ``int8`` has none. Raises a ConfigError for tensors of other shapes,
    types or places.
    """

    scheme: str
    shape: tuple[int, int]
    values: Tensor
    scales: Tensor
    minimums: Tensor | None = None

    def __post_init__(self) -> None:
        wanted = tensor_forms(self.scheme, self.shape)
        for name in TENSORS:
            tensor = getattr(self, name)
            if (tensor is None) != (name not in wanted):
                expected = "none" if tensor is not None else "a tensor"
                raise ConfigError(f"{name}: expected {expected} with {self.scheme}")
            if tensor is not None:
                check_tensor(name, tensor, *wanted[name], self.values.device, contiguous=True)

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], *, scheme: str, shape: tuple[int, int]
    ) -> "QuantisedWeight":
        """Return the weight that ``tensors`` gave; they may come from outside.

        Raises a ConfigError for tensors that do not fit, and for scales that are not finite.
        """
        if extra := sorted(tensors.keys() - set(TENSORS)):
            raise ConfigError(f"weight: expected only {', '.join(TENSORS)}, got {extra[0]!r}")
        if missing := sorted(tensor_forms(scheme, shape).keys() - tensors.keys()):
            raise ConfigError(f"weight: expected {missing[0]} with {scheme}, got none")
        weight = cls(scheme=scheme, shape=shape, **tensors)
        weight.require_finite()
        return weight

    def require_finite(self) -> None:
        """Raise a ConfigError for a scale or minimum that is not a finite number."""
        for name in ("scales", "minimums"):
            numbers = getattr(self, name)
            if numbers is not None and not bool(numbers.isfinite().all()):
                raise ConfigError(f"{name}: expected finite numbers, got one that is not")

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, as ``of`` takes them."""
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.values.device

    @property
    def is_cpu(self) -> bool:
        """Whether the tensors are on the CPU."""
        return self.values.is_cpu

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def dequantised(
        self, dtype: torch.dtype = torch.float32, *, first: int = 0, last: int | None = None
    ) -> Float[Tensor, "rows I"]:
        """Return the weights as numbers; only those of rows ``first`` .. ``last`` - 1 if given."""
        outputs, inputs = self.shape
        last = outputs if last is None else min(last, outputs)
        blocks = slice(first // ROWS, -(-last // ROWS))
        codes = _in_chunks(self.values[blocks], self.scheme).float()  # (b, G, 8, 16, 4)
        scales = self.scales[blocks].float()
        if self.minimums is None:
            numbers = (codes - 128) * scales[:, :, None, :, None]
        else:
            numbers = codes * scales[:, :, None, :, None]
            numbers += self.minimums[blocks].float()[:, :, None, :, None]
        start = blocks.start * ROWS
        found: Tensor = _in_rows(numbers)[first - start : last - start, :inputs].to(dtype)
        return found

    def __getitem__(self, rows: Int[Tensor, " W"] | slice) -> "QuantisedWeight":
        """Return a weight of only these rows, in this order; whole blocks are views."""
        if isinstance(rows, slice) and rows.step is None and (rows.start or 0) % ROWS == 0:
            first, last, _ = rows.indices(self.shape[0])
            if first < last:
                blocks = slice(first // ROWS, -(-last // ROWS))
                parts = {name: tensor[blocks] for name, tensor in self.tensors().items()}
                if last == self.shape[0] or last % ROWS == 0:
                    shape = (last - first, self.shape[1])
                    return QuantisedWeight(scheme=self.scheme, shape=shape, **parts)
        index = torch.arange(self.shape[0], device=self.device)[rows]
        block, at = index // ROWS, index % ROWS
        chunked = self.values.view(len(self.values), -1, ROWS, 4)
        values = chunked[block, :, at]  # (W, chunks, 4)
        scales = blocked(self.scales.movedim(-1, 1)[block, at])
        minimums = self.minimums
        if minimums is not None:
            minimums = blocked(minimums.movedim(-1, 1)[block, at])
        fill = 128 if self.scheme == "int8" else 0
        return QuantisedWeight(
            scheme=self.scheme,
            shape=(len(index), self.shape[1]),
            values=blocked(values, fill).movedim(-1, -2).flatten(1).contiguous(),
            scales=scales,
            minimums=minimums,
        )


def tensor_forms(
    scheme: str, shape: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and type of each tensor of a weight of this shape, by name."""
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    if len(shape) != 2 or min(shape) < 1:
        raise ConfigError(f"shape: expected (outputs, inputs) of at least 1, got {shape}")
    blocks, groups = -(-shape[0] // ROWS), -(-shape[1] // GROUP)
    of_groups = ((blocks, groups, ROWS), torch.float16)
    if scheme == "int8":
        values = ((blocks, groups * ROWS * GROUP), torch.uint8)
        return {"values": values, "scales": of_groups}
    return {
        "values": ((blocks, groups * ROWS * GROUP // 2), torch.uint8),
        "scales": of_groups,
        "minimums": of_groups,
    }


def concatenated(weights: Sequence[QuantisedWeight]) -> QuantisedWeight:
    """Return the rows of several weights, of one scheme and with the same inputs, as one.

    Where a weight's rows are not a multiple of 16, the next one's rows follow without a gap.
    """
    scheme, inputs = weights[0].scheme, weights[0].shape[1]
    for weight in weights:
        if (weight.scheme, weight.shape[1]) != (scheme, inputs):
            raise ConfigError(
                f"weights: expected {scheme} of {inputs} inputs, got {weight.scheme} of "
                f"{weight.shape[1]}"
            )
    outputs = [weight.shape[0] for weight in weights]
    named = [weight.tensors() for weight in weights]
    whole = QuantisedWeight(
        scheme=scheme,
        shape=(sum(len(of["values"]) for of in named) * ROWS, inputs),
        **{name: torch.cat([of[name] for of in named]) for name in named[0]},
    )
    if all(rows % ROWS == 0 for rows in outputs):
        return whole
    starts, index = 0, []
    for rows in outputs:
        index.append(torch.arange(starts, starts + rows, device=whole.device))
        starts += -(-rows // ROWS) * ROWS
    return whole[torch.cat(index)]


def _in_chunks(values: Tensor, scheme: str) -> UInt8[Tensor, "b G 8 16 4"]:
    """Return the codes of each group, one a byte."""
    if scheme == "int8":
        return values.view(len(values), -1, 8, ROWS, 4)
    halves = values.view(len(values), -1, 4, ROWS, 4)
    return torch.cat((halves & 15, halves >> 4), dim=2)


def _in_rows(chunks: Tensor) -> Tensor:
    """Return (b, G, 8, 16, 4) as rows (16 b, 32 G)."""
    blocks, groups = chunks.shape[:2]
    return chunks.permute(0, 3, 1, 2, 4).reshape(blocks * ROWS, groups * GROUP)


def blocked(rows: Tensor, fill: int = 0) -> Tensor:
    """Return rows (W, ...) in blocks (B, ..., 16); missing ones are ``fill``."""
    missing = -len(rows) % ROWS
    if missing:
        rows = torch.cat((rows, rows.new_full((missing, *rows.shape[1:]), fill)))
    return rows.view(-1, ROWS, *rows.shape[1:]).movedim(1, -1).contiguous()


def packed(codes: UInt8[Tensor, "O I"], fill: int) -> UInt8[Tensor, "B G 8 16 4"]:
    """Return codes in the order of ``values``, one a byte; missing ones are ``fill``."""
    outputs, inputs = codes.shape
    codes = F.pad(codes, (0, -inputs % GROUP, 0, -outputs % ROWS), value=fill)
    return codes.view(len(codes) // ROWS, ROWS, -1, 8, 4).permute(0, 2, 3, 1, 4)
