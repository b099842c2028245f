"""Check what a caller passes to a model, in the same words for every kind of model.

Without these checks a wrong argument would wrap around (a negative position), fail deep inside
PyTorch, or lead the compiled kernels outside a tensor. A step is checked once, at its first call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.errors import ConfigError
from offramp.models.base import EarlyExitModel, Step
from offramp.models.kv_cache import KVCache


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise a ConfigError unless these are token ids (B, T) of a model."""
    integer = not (input_ids.is_floating_point() or input_ids.is_complex())
    if input_ids.dim() != 2 or not integer or input_ids.dtype == torch.bool:
        raise ConfigError(
            "input_ids: expected whole numbers of shape (rows, tokens), got "
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    if input_ids.numel() == 0:
        raise ConfigError("input_ids: expected at least 1 token, got none")
    for token in (int(input_ids.min()), int(input_ids.max())):
        if not 0 <= token < vocab_size:
            raise ConfigError(f"input_ids: expected from 0 to {vocab_size - 1}, got {token}")


def check_call(
    model: EarlyExitModel, h: Tensor, start: int, stop: int, active: Tensor | None = None
) -> None:
    """Raise a ConfigError unless blocks start+1 .. stop can run on the states ``h`` (B, T, D)."""
    check_states(h, model.hidden_size)
    if not 0 <= start <= stop <= model.num_layers:
        raise ConfigError(
            f"layers: expected 0 <= start <= stop <= {model.num_layers}, got {start} and {stop}"
        )
    if active is not None and (active.shape != h.shape[:2] or active.dtype != torch.bool):
        raise ConfigError(
            f"active: expected booleans of shape {tuple(h.shape[:2])}, got {about(active)}"
        )


def check_states(h: Tensor, hidden_size: int) -> None:
    """Raise a ConfigError unless ``h`` are states (B, T, D) of at least one token."""
    if h.dim() != 3 or h.shape[2] != hidden_size or not h.is_floating_point() or not h.numel():
        raise ConfigError(
            f"states: expected floats of shape (rows, tokens, {hidden_size}) with at least 1 "
            f"token, got {about(h)}"
        )


def check_exit_layer(exit_layer: int, num_layers: int) -> None:
    """Raise a ConfigError unless this is a layer 1..L."""
    if not 1 <= exit_layer <= num_layers:
        raise ConfigError(f"exit_layer: expected from 1 to {num_layers}, got {exit_layer}")


def require_cache(step: Step) -> KVCache:
    """Return the cache of a step. Raises a ConfigError if it has none."""
    if step.cache is None:
        raise ConfigError("step: expected one with a cache, got one without")
    return step.cache


def checked_end(
    step: Step, x: Tensor, *, longest: int, why: str = "max_position_embeddings"
) -> int:
    """Return the largest position of a key, plus 1, for a call on ``x`` (B, T, ...).

    Raises a ConfigError for positions, padding or rows of a wrong shape or type, for positions
    that are negative, beyond ``longest`` or beyond the cache, for rows that the cache does not
    have, and for an ``end`` of the step that is not the largest position plus 1. Positions and rows
    that are on a GPU are not read if the step has an ``end``, because that would wait for the GPU.
    ``why`` is where ``longest`` comes from.
    """
    positions, real, cache = step.positions, step.real, step.cache
    batch, tokens = x.shape[0], x.shape[1]
    if positions.shape != (1, tokens):
        check_tensor("positions", positions, (batch, tokens), torch.long, x.device)
    elif positions.dtype != torch.long or positions.is_cpu != x.is_cpu:
        check_tensor("positions", positions, (1, tokens), torch.long, x.device)
    if real is not None:
        check_tensor("real", real, (batch, tokens), torch.bool, x.device)
    known = step.end is not None and not x.is_cpu
    if cache is not None and not known:
        places = positions.flatten().tolist()
        first, last = min(places), max(places)
        if step.end is not None and step.end != last + 1:
            raise ConfigError(
                f"end: expected the largest position plus 1, {last + 1}, got {step.end}"
            )
    elif x.device.type == "cpu":
        first, last = int(positions.min()), max(tokens - 1, int(positions.max()))
    else:  # to read positions would wait for the device
        first, last = 0, tokens - 1 if step.end is None else step.end - 1
        if last < 0:
            raise ConfigError(f"end: expected at least 1, got {step.end}")
    if first < 0:
        raise ConfigError(f"positions: expected at least 0, got {first}")
    if last >= longest:
        raise ConfigError(f"sequence length: expected at most {longest} ({why}), got {last + 1}")
    if cache is None:
        return int(tokens)
    _, held, _, slots, _ = cache.keys.shape
    if last + 1 >= slots:  # the last slot is a spare one
        cache.require(int(last + 1))
    if step.rows is not None:
        check_tensor("rows", step.rows, (batch,), torch.long, x.device)
        for row in () if known else step.rows.tolist():
            if not 0 <= row < held:
                raise ConfigError(f"rows: the cache holds {held} rows, got row {row}")
    elif batch != held:
        raise ConfigError(f"rows: the cache holds {held} rows, got {batch} without their names")
    return int(last + 1)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    contiguous: bool = False,
) -> None:
    """Raise a ConfigError unless a tensor has this shape and type and is on this device."""
    if (
        tensor.shape != tuple(shape)
        or tensor.dtype != dtype
        or tensor.device != device
        or tensor.layout != torch.strided
        or (contiguous and not tensor.is_contiguous())
    ):
        raise ConfigError(
            f"{name}: expected {dtype} of shape {tuple(shape)} on {device}"
            f"{', contiguous' if contiguous else ''}, got {about(tensor)}"
        )


def about(tensor: Tensor) -> str:
    """Return the type, shape and device of a tensor in words."""
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
