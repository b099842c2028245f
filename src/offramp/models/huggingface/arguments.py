"""The arguments of a Hugging Face model's blocks besides the state, found in a recorded pass."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.models.huggingface.calls import Call

STATE, POSITIONS, MASK, CACHE = "<state>", "<positions>", "<mask>", "<cache>"
"Placeholder for an argument of a module that differs in each call."
SHARED = "<shared>"
"Placeholder for the mapping in which blocks leave keys and values for later blocks."
OF_TOKENS = "<of tokens>"
"Placeholder for numbers (B, T, P) that the model derives from the token ids for one block."
_MASKS = ("attention_mask", "causal_mask", "causal_attention_mask")
_UNUSED = ("cache_position",)  # used only by the library's own caches
_CONSTANT = (type(None), bool, int, float, str)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotary:
    """The call of a module that computes rotary tables from the positions and a state's type."""

    module: nn.Module
    arguments: Mapping[str, Any]
    "Arguments by name: STATE, POSITIONS or constants."


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block, and its arguments besides the state."""

    module: nn.Module
    arguments: Mapping[str, Any]
    "Arguments by name: POSITIONS, MASK, CACHE, SHARED, OF_TOKENS, a Rotary or constants."
    window: int | None
    "Number of positions that a token attends to, including its own; None for all."
    gives_tuple: bool
    "Whether it returns its state as the first value of a tuple."

    @property
    def of_tokens(self) -> tuple[str, ...]:
        """The names of the arguments that the model derives from the token ids."""
        return tuple(name for name, what in self.arguments.items() if what is OF_TOKENS)


def blocks_of(
    config: Any, calls: Sequence[Call], positions: Tensor, cache: Any, outside: Sequence[Call]
) -> tuple[Block, ...]:
    """Return the blocks of recorded calls.

    ``outside`` are the calls of modules outside the blocks. Raises LookupError with the name of an
    argument, or of a kind of layer, that is unknown.
    """
    tables: dict[int, Rotary] = {}
    return tuple(
        Block(
            module=call.module,
            arguments=_arguments(call, positions, cache, outside, tables),
            window=_window(config, index),
            gives_tuple=isinstance(call.output, tuple),
        )
        for index, call in enumerate(calls)
    )


def _arguments(
    call: Call,
    positions: Tensor,
    cache: Any,
    outside: Sequence[Call],
    tables: dict[int, Rotary],
) -> dict[str, Any]:
    _, *others = call.arguments.items()
    found: dict[str, Any] = {}
    for name, value in others:
        if name in _MASKS:
            found[name] = MASK
        elif value is cache and cache is not None:
            found[name] = CACHE
        elif isinstance(value, _CONSTANT):
            found[name] = value
        elif _is_positions(value, positions):
            found[name] = POSITIONS
        elif name not in _UNUSED:
            made = next((each for each in outside if _are(each.output, value)), None)
            if made is not None:
                if id(made) not in tables:
                    tables[id(made)] = _rotary(name, made, positions)
                found[name] = tables[id(made)]
            elif _is_shared(value):
                found[name] = SHARED
            elif _is_of_tokens(value, positions):
                found[name] = OF_TOKENS
            else:
                raise LookupError(name)
    return found


def _rotary(name: str, made: Call, positions: Tensor) -> Rotary:
    arguments: dict[str, Any] = {}
    for each, given in made.arguments.items():
        if isinstance(given, _CONSTANT):
            arguments[each] = given
        elif _is_positions(given, positions):
            arguments[each] = POSITIONS
        elif isinstance(given, Tensor) and given.is_floating_point():
            arguments[each] = STATE
        else:
            raise LookupError(name)
    return Rotary(module=made.module, arguments=arguments)


def _window(config: Any, index: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    if kinds is None:
        return window if getattr(config, "use_sliding_window", True) else None
    if kinds[index] not in ("full_attention", "sliding_attention"):
        raise LookupError(kinds[index])
    return window if kinds[index] == "sliding_attention" else None


def _is_positions(value: Any, positions: Tensor) -> bool:
    return isinstance(value, Tensor) and torch.equal(value, positions)


def _are(output: Any, value: Any) -> bool:
    """Return whether a value is a module's output, or consists of whole views of its tensors."""
    if output is value:
        return True
    if not (isinstance(output, tuple) and isinstance(value, tuple) and len(output) == len(value)):
        return False
    return all(
        isinstance(own, Tensor)
        and isinstance(given, Tensor)
        and own.shape == given.shape
        and own.stride() == given.stride()
        and own.data_ptr() == given.data_ptr()
        for own, given in zip(output, value, strict=True)
    )


def _is_shared(value: Any) -> bool:
    """Return whether a value is a mapping of pairs of tensors, or an empty one."""
    return isinstance(value, MutableMapping) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Tensor)
        for pair in value.values()
    )


def _is_of_tokens(value: Any, positions: Tensor) -> bool:
    """Return whether a value can be what the model derives from the ids of the recorded tokens.

    ``check`` finds out whether it is.
    """
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim == 3
        and value.shape[:2] == positions.shape
    )
