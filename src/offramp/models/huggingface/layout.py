"""Find the blocks, norm and head of a Hugging Face causal language model in a recorded pass.

The code does not depend on model classes. It runs a few tokens through the model and records the
inputs and outputs of every module (``calls``). From them it finds the list of blocks, the
arguments of each block besides the state (mask, positions, rotary tables, cache), and the modules
between the last block and the LM head. ``runner`` then checks that running the blocks one by one
gives the model's own states; if not, the blocks count as unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.models.huggingface.calls import Call, watched_pass

TOKENS = 6
STATE, POSITIONS, MASK, CACHE = "<state>", "<positions>", "<mask>", "<cache>"
"Placeholder for an argument of a module that differs in each call."
_MASKS = ("attention_mask", "causal_mask", "causal_attention_mask")
_UNUSED = ("cache_position",)  # used only by the library's own caches
_CONSTANT = (type(None), bool, int, float, str)


@dataclass(frozen=True, kw_only=True)
class Longest:
    """The number of positions of a model's longest sequence, and where it comes from."""

    positions: int
    why: str = "max_position_embeddings"

    def require(self, end: int) -> None:
        """Raise ConfigError unless the positions 0 .. end - 1 exist."""
        if end > self.positions:
            raise ConfigError(
                f"sequence length: expected at most {self.positions} ({self.why}), got {end}"
            )


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
    "Arguments by name: POSITIONS, MASK, CACHE, a Rotary or constants."
    window: int | None
    "Number of positions that a token attends to, including its own; None for all."


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parts of a model, and the arguments of its blocks."""

    blocks: tuple[Block, ...]
    "The blocks; empty if their arguments are unknown."
    block_modules: tuple[nn.Module, ...]
    "The modules of the blocks, which may be known if ``blocks`` is empty."
    below: tuple[nn.Module, ...]
    "The modules that are called before the first block."
    above: tuple[nn.Module, ...]
    "The other modules that are called outside the blocks."
    why_no_blocks: str
    norm: nn.Module | None
    "The final norm."
    after_norm: tuple[nn.Module, ...]
    "The modules between the final norm (or the last block, if there is none) and the LM head."
    head: nn.Linear
    embedding: nn.Module | None
    "The input embedding, if its output is the input of the first block without a change."
    ids: Tensor
    "(1, TOKENS) The tokens of the recorded pass."
    logits: Tensor
    "(1, TOKENS, V) The model's own logits."
    head_output: Tensor
    "(1, TOKENS, V) The output of the head, before any scaling or soft cap."
    last_state: Tensor
    "(1, TOKENS, D) The output of the last block."


def decoder_config(lm: Any) -> Any:
    """Return the config of a model's decoder.

    Raises UnsupportedArchitectureError if it has several, or no number of layers.
    """
    config = lm.config
    try:
        text = config.get_text_config()
        layers = text.num_hidden_layers
    except (AttributeError, ValueError):
        layers = None
    if type(layers) is not int or layers < 1:
        raise UnsupportedArchitectureError(
            f"{config.model_type}: expected a decoder-only (causal) language model, one stack of "
            "layers on token ids, got another architecture"
        )
    return text


def longest_of(config: Any) -> Longest:
    """Return the longest sequence of a model with this config.

    With ``longrope`` the rotary factors of all tokens change in a sequence of more than
    ``original_max_position_embeddings`` tokens. Keys in a cache, and shorter sequences of the same
    batch, would keep the other factors, so such a model is used up to this length.
    """
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):
        if not isinstance(rope, Mapping) or rope.get("rope_type") != "longrope":
            continue
        change = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if change and change < positions:
            return Longest(
                positions=change,
                why="original_max_position_embeddings, after which longrope changes the rotary "
                "factors of all earlier tokens",
            )
    return Longest(positions=positions)


def watch(lm: Any, config: Any) -> Layout:
    """Record a pass of a ``transformers`` causal language model and return its layout.

    ``config`` is that of its decoder. Raises UnsupportedArchitectureError if it is not a
    decoder-only language model, or if the path from its last state to its logits is unknown.
    """
    kind = config.model_type
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedArchitectureError(f"{kind}: expected a language model with an LM head")
    ids = (torch.arange(TOKENS, device=head.weight.device)[None] * 7 + 11) % head.out_features
    positions = torch.arange(TOKENS, device=ids.device)[None]
    calls, logits, cache = watched_pass(lm, ids, kind)
    blocks, outside, way, last_state = _ways(lm, config.num_hidden_layers, calls, head)
    is_norm = bool(way) and "norm" in type(way[0]).__name__.lower()
    if last_state is None or not (blocks or is_norm):
        raise UnsupportedArchitectureError(
            f"{kind}: unknown computation between the last state and the logits, so logits at "
            "exits cannot be computed"
        )
    if last_state.ndim != 3:
        raise UnsupportedArchitectureError(
            f"{kind}: expected a state (B, T, D) after the last block, got one of shape "
            f"{tuple(last_state.shape)} for 1 x {TOKENS} tokens"
        )
    given: list[Block] = []
    tables: dict[int, Rotary] = {}
    why = "" if blocks else "no list of modules was recognised as its blocks"
    for index, call in enumerate(blocks):
        try:
            arguments = _block_arguments(call, positions, cache, outside, tables)
            window = _window(config, index)
        except LookupError as unknown:
            given, why = [], f"its blocks need {unknown.args[0]}"
            break
        given.append(Block(module=call.module, arguments=arguments, window=window))
    first = calls.index(blocks[0]) if blocks else 0
    before = calls[:first]
    embedding = lm.get_input_embeddings()
    with torch.no_grad():
        plain = bool(blocks) and torch.equal(embedding(ids), blocks[0].state)
    return Layout(
        blocks=tuple(given),
        why_no_blocks=why,
        block_modules=tuple(call.module for call in blocks),
        below=tuple(call.module for call in outside if call in before),
        above=tuple(call.module for call in outside if call not in before),
        norm=way[0] if is_norm else None,
        after_norm=tuple(way[1:] if is_norm else way),
        head=head,
        embedding=embedding if plain else None,
        ids=ids,
        logits=logits,
        head_output=next(call.output for call in calls if call.module is head).detach(),
        last_state=last_state.detach(),
    )


def _ways(
    lm: nn.Module, layers: int, calls: Sequence[Call], head: nn.Linear
) -> tuple[list[Call], list[Call], list[nn.Module], Tensor | None]:
    """Return the blocks' calls, the other calls, the modules to the head, and their input."""
    lists = [m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    for each in (*lists, nn.ModuleList()):
        blocks = [call for call in calls if call.module in set(each)]
        if [call.module for call in blocks] != list(each):
            continue
        inside = set(each.modules())
        around = {m for m in lm.modules() if not inside.isdisjoint(m.modules())}
        outside = [call for call in calls if call.module not in around]
        way, first = _way_to(head, outside)
        if not blocks or _same(first, blocks[-1].result):
            return blocks, outside, way, first
    return [], list(calls), [], None


def _way_to(head: nn.Linear, outside: Sequence[Call]) -> tuple[list[nn.Module], Tensor | None]:
    """Return the chain of modules that ends at the head, and the input of the first one."""
    way: list[nn.Module] = []
    state = next((call.state for call in outside if call.module is head), None)
    for call in reversed(outside):  # a module's call ends before that of its parent
        if _same(call.result, state) and not _same(call.state, state):
            way.insert(0, call.module)
            state = call.state
    return way, state


def _block_arguments(
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
            if id(value) not in tables:
                tables[id(value)] = _rotary(name, value, positions, outside)
            found[name] = tables[id(value)]
    return found


def _rotary(name: str, value: Any, positions: Tensor, outside: Sequence[Call]) -> Rotary:
    made = next((call for call in outside if call.output is value), None)
    if made is None:
        raise LookupError(name)
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


def _same(a: Any, b: Any) -> bool:
    """Return whether two tensors are the same memory."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of their type."""
    worst = (a.float() - b.float()).abs().max()
    return bool(worst <= (1e-3 if a.dtype in (torch.float32, torch.float64) else 0.1) * b.std())
