"""The weights of a pretrained checkpoint: which tensors count, and their precision.

Both runners, saving and the hash use these rules, which are those of ``transformers``.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import CheckpointError
from offramp.files import TensorInfo, read_tensors, tensor_infos
from offramp.models.sources import Source
from offramp.reading import read_json

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The precisions of models, by their names in JSON files."""
_STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_COMPUTED = re.compile(r"(^|\.)(\w*inv_freq|position_ids|embed_positions)$")
"""Positions and rotary frequencies, which old checkpoints hold and every model computes anew."""
_MASK = re.compile(r"(^|\.)(\w*attn|\w*attention)\.(bias|causal_mask)$")
"""Causal masks of shape (1, 1, N, N), which old checkpoints hold."""
_CONSTANT = re.compile(r"(^|\.)(masked_bias|version)$")
"""Single numbers that old checkpoints hold."""
_SHOWN = 3


def stored_tensors(source: Source) -> dict[str, TensorInfo]:
    """Return the type and the shape of each tensor of a checkpoint, from the files' headers.

    Raises CheckpointError for a tensor that two files contain.
    """
    found: dict[str, TensorInfo] = {}
    for path in source.weights:
        infos = tensor_infos(path)
        if twice := sorted(found.keys() & infos.keys()):
            raise CheckpointError(
                f"{path}: expected each tensor in one file of the checkpoint, got {twice[0]} in two"
            )
        found |= infos
    return found


def stored_dtype(source: Source) -> torch.dtype:
    """Return the precision of a checkpoint, to which all its weights are converted.

    It is the ``dtype`` in ``config.json``, or else that of the first floating-point tensor.
    """
    path = source.folder / "config.json"
    config = read_json(path)
    written = None
    if isinstance(config, dict):
        written = config.get("dtype") or config.get("torch_dtype")
    if written is None:
        kinds = (info.dtype for info in stored_tensors(source).values())
        written = next((_STORED[kind] for kind in kinds if kind in _STORED), "float32")
    name = str(written).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(
            f"{path}: dtype: expected one of {', '.join(DTYPES)}, got {written!r}"
        )
    return DTYPES[name]


def load_state(source: Source, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, in one precision, without computed buffers.

    They are copies in memory: none is mapped to its file.
    """
    check_types(source)
    kept = {name for name, info in stored_tensors(source).items() if not is_buffer(name, info)}
    return {
        name: tensor.to(dtype, copy=True)
        for path in source.weights
        for name, tensor in read_tensors(path).items()
        if name in kept
    }


def check_types(source: Source) -> None:
    """Raise a CheckpointError for weights that are not floating-point numbers."""
    for name, info in stored_tensors(source).items():
        is_weight = name.endswith((".weight", ".bias")) and not is_buffer(name, info)
        if is_weight and info.dtype not in _STORED:
            raise CheckpointError(
                f"{source.id}: {name}: expected a weight of type {', '.join(_STORED)}, got "
                f"{info.dtype}"
            )


def is_buffer(name: str, info: TensorInfo) -> bool:
    """Return whether a stored tensor is one that every model computes itself."""
    shape = info.shape
    mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(
        _COMPUTED.search(name)
        or (mask and _MASK.search(name))
        or (math.prod(shape) == 1 and _CONSTANT.search(name))
    )


def refuse_tensors(source: Source, problems: Mapping[str, Iterable[Any]]) -> None:
    """Raise a CheckpointError that names the tensors that do not fit ``config.json``.

    ``problems`` are the names by what is wrong with them.
    """
    for what, names in problems.items():
        if found := sorted(map(str, names)):
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise CheckpointError(
                f"{source.id}: the weights do not fit config.json: {what} "
                f"{', '.join(found[:_SHOWN])}{more}"
            )


def to_precision(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Convert a model's parameters in place; None keeps them.

    Buffers, such as the frequencies of rotary positions, keep their precision: a model that is
    loaded in ``dtype`` has them in float32, too.
    """
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
