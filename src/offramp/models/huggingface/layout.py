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
from offramp.models.huggingface.altup import AltUp, MergedNorm, altup_of
from offramp.models.huggingface.arguments import Block, blocks_of
from offramp.models.huggingface.calls import Call, watched_pass

TOKENS = 6


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
    "The final norm; a MergedNorm if the states are stacked."
    altup: AltUp | None
    "How states are stacked; None if a block has one state (B, T, D) for each token."
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

    def state_of(self, out: Tensor) -> Tensor:
        """Return a block's input or output as a state (B, T, D)."""
        return out if self.altup is None else self.altup.flat(out)

    def for_block(self, h: Tensor) -> Tensor:
        """Return a state (B, T, D) as the blocks take it."""
        return h if self.altup is None else self.altup.stacked(h)


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
    blocks, outside, way, last_state, altup = _ways(lm, config.num_hidden_layers, calls, head)
    is_norm = bool(way) and "norm" in type(way[0]).__name__.lower()
    if last_state is None or not (is_norm or (blocks and altup is None)):
        raise UnsupportedArchitectureError(
            f"{kind}: unknown computation between the last state and the logits, so logits at "
            "exits cannot be computed"
        )
    if last_state.ndim != 3:
        raise UnsupportedArchitectureError(
            f"{kind}: expected a state (B, T, D) after the last block, got one of shape "
            f"{tuple(last_state.shape)} for 1 x {TOKENS} tokens"
        )
    given: tuple[Block, ...] = ()
    why = "" if blocks else "no list of modules was recognised as its blocks"
    try:
        given = blocks_of(config, blocks, positions, cache, outside)
    except LookupError as unknown:
        why = f"its blocks need {unknown.args[0]}"
    norm = way[0] if is_norm else None
    if altup is not None and norm is not None:
        norm, last_state = MergedNorm(norm, altup), altup.flat(blocks[-1].result)
    first = calls.index(blocks[0]) if blocks else 0
    before = calls[:first]
    embedding = lm.get_input_embeddings()
    with torch.no_grad():
        plain = bool(blocks) and torch.equal(embedding(ids), blocks[0].state)
    return Layout(
        blocks=given,
        why_no_blocks=why,
        block_modules=tuple(call.module for call in blocks),
        below=tuple(call.module for call in outside if call in before),
        above=tuple(call.module for call in outside if call not in before),
        norm=norm,
        altup=altup,
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
) -> tuple[list[Call], list[Call], list[nn.Module], Tensor | None, AltUp | None]:
    """Return the blocks' calls, the other calls, the modules to the head, and their input.

    If the states are stacked, the last value says how they become this input.
    """
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
            return blocks, outside, way, first, None
        if altup := altup_of(blocks[-1], outside, first):
            return blocks, outside, way, first, altup
    return [], list(calls), [], None, None


def _way_to(head: nn.Linear, outside: Sequence[Call]) -> tuple[list[nn.Module], Tensor | None]:
    """Return the chain of modules that ends at the head, and the input of the first one."""
    way: list[nn.Module] = []
    state = next((call.state for call in outside if call.module is head), None)
    for call in reversed(outside):  # a module's call ends before that of its parent
        if _same(call.result, state) and not _same(call.state, state):
            way.insert(0, call.module)
            state = call.state
    return way, state


def _same(a: Any, b: Any) -> bool:
    """Return whether two tensors are the same memory."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()
