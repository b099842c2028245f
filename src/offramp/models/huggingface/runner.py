"""Run the blocks of a Hugging Face model one by one, with or without a ``KVCache``.

A block gets what the recorded pass gave it (``arguments``), computed anew for the tokens of each
call.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import UnsupportedArchitectureError
from offramp.models.base import Step
from offramp.models.checks import checked_end
from offramp.models.huggingface.arguments import (
    CACHE,
    MASK,
    OF_TOKENS,
    POSITIONS,
    SHARED,
    STATE,
    Block,
    Rotary,
)
from offramp.models.huggingface.calls import accepted, named
from offramp.models.huggingface.layout import Layout, Longest
from offramp.models.huggingface.shared import SharedKeysValues
from offramp.models.huggingface.step_cache import Shape, StepCache, WrittenError, stored_shape
from offramp.models.huggingface.token_inputs import TokenInputs
from offramp.models.kv_cache import KVCache

_NAMES_OF_IDS = ("token_id", "token_index")
"""Ends of the names of a config's fields that hold the id of a special token."""


class BlockRunner:
    """The blocks of a model with a known layout; it holds references, not copies.

    ``why_no_cache`` is the reason why keys and values cannot be cached; empty if they can.
    """

    def __init__(self, lm: Any, layout: Layout, *, longest: Longest) -> None:
        self.lm = lm
        self.layout = layout
        self.eager = lm.config._attn_implementation == "eager"
        self.longest = longest
        self.shapes: dict[int, Shape] = {}
        "The shape of keys and values of each block (from 0) that writes them."
        self.sources: dict[str, int] = {}
        "The block (from 0) whose keys and values later blocks read under a name."
        self.why_no_cache = ""
        self.token_inputs = TokenInputs(lm, layout.blocks)
        self.embedding = self._plain_embedding()

    @property
    def complete_from(self) -> int:
        """The number of the last block that writes keys and values; L if it is not known."""
        return max(self.shapes) + 1 if self.shapes and not self.why_no_cache else len(self.blocks)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks."""
        return self.layout.blocks

    def embed(self, input_ids: Tensor, step: Step) -> Tensor:
        """Return the input (B, T, D) that the model passes to its first block, for ids (B, T)."""
        self._end(input_ids, step)
        if self.token_inputs.needed:
            return self.layout.state_of(self.token_inputs.embed(input_ids, step))
        if self.embedding is not None:
            embedded: Tensor = self.embedding(input_ids)
            return embedded
        return self._reached(input_ids, step.positions)

    def _plain_embedding(self) -> nn.Module | None:
        """Return the embedding if the model takes nothing else to its first block.

        A model for images and text may take another one for the special tokens of its config.
        """
        embedding = self.layout.embedding
        ids = special_ids(self.lm.config, self.layout.head)
        if embedding is None or not len(ids):
            return embedding
        with torch.no_grad(), suppress(Exception):  # which a model may not accept in a text
            reached = self._reached(ids[:, None], torch.zeros_like(ids[:1, None]))
            return embedding if torch.equal(embedding(ids[:, None]), reached) else None
        return embedding

    def _reached(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Return the input of the first block in a pass of the whole model."""
        arguments = accepted(
            self.lm,
            input_ids=input_ids,
            position_ids=positions.repeat(len(input_ids) // len(positions), 1),
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
        )
        first = self.layout.blocks[0].module
        with first.register_forward_pre_hook(_leave, with_kwargs=True):
            try:
                self.lm(**arguments)
            except _AtFirstBlockError as reached:
                return self.layout.state_of(reached.state)
        raise AssertionError("the first block was not reached")

    def run(
        self, h: Tensor, start: int, stop: int, step: Step, active: Tensor | None = None
    ) -> Tensor:
        """Run blocks start+1 .. stop on states (B, T, D)."""
        given = self.given(h, step, StepCache(step, self._end(h, step), self.shapes))
        return self.through(h, start, stop, given, active)

    def through(
        self, h: Tensor, start: int, stop: int, given: "Given", active: Tensor | None = None
    ) -> Tensor:
        """Run blocks start+1 .. stop with the arguments of a call."""
        x = self.layout.for_block(h)
        for index in range(start, stop):
            out = self._call(x, index, given)
            x = out if active is None else torch.where(active[..., None], out, x)
        return self.layout.state_of(x)

    def _call(self, x: Tensor, index: int, given: "Given") -> Tensor:
        block = self.blocks[index]
        arguments = given(index, block)
        if block.module.training and getattr(block.module, "gradient_checkpointing", False):
            arguments |= {name: False for name in ("use_cache",) if name in arguments}
        out = block.module(x, **arguments)
        state: Tensor = out[0] if isinstance(out, tuple) else out
        return state

    def project_kv(self, h: Tensor, start: int, stop: int, step: Step) -> None:
        """Write the keys and values of blocks start+1 .. stop, without the rest of the blocks."""
        cache = StepCache(step, self._end(h, step), self.shapes, leave=True)
        given, x = self.given(h, step, cache), self.layout.for_block(h)
        for index in range(start, stop):
            if index in self.shapes:
                with suppress(WrittenError):
                    self._call(x, index, given)

    def make_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for these blocks."""
        return KVCache(batch_size=batch_size, capacity=capacity, **self._form())

    def _end(self, x: Tensor, step: Step) -> int:
        """Return the end of the positions 0 .. end - 1 at which there are keys."""
        owner = self.layout.head.weight
        if step.cache is not None and not step.cache.known_to(owner):
            step.cache.require_form(owner, **self._form())
        return checked_end(step, x, longest=self.longest.positions, why=self.longest.why)

    def _form(self) -> dict[str, Any]:
        """Return what a cache of these blocks is like."""
        if self.why_no_cache:
            raise UnsupportedArchitectureError(self.why_no_cache)
        heads, key_dim, value_dim = stored_shape(self.shapes)
        weight = self.layout.head.weight
        return {
            "num_layers": len(self.shapes),
            "num_heads": heads,
            "head_dim": key_dim,
            "value_dim": value_dim,
            "dtype": weight.dtype,
            "device": weight.device,
        }

    def given(self, h: Tensor, step: Step, cache: StepCache) -> "Given":
        """Return the arguments of the blocks in one call."""
        return Given(self, h, step, cache)


def special_ids(config: Any, head: nn.Linear) -> Tensor:
    """Return the ids (N,) in the vocabulary that the fields of a config name."""
    named = [value for name, value in config.to_dict().items() if name.endswith(_NAMES_OF_IDS)]
    ids = sorted({each for each in named if type(each) is int and 0 <= each < head.out_features})
    return torch.tensor(ids, dtype=torch.long, device=head.weight.device)


class Given:
    """The arguments of the blocks in one call; each mask and table is computed once."""

    def __init__(self, runner: BlockRunner, h: Tensor, step: Step, cache: StepCache) -> None:
        self.h, self.step, self.cache, self.eager = h, step, cache, runner.eager
        self.token_inputs = runner.token_inputs
        self.shared = SharedKeysValues(step, runner, cache, runner.sources)
        self.positions = step.positions.expand(len(h), -1)
        self.masks: dict[int | None, Tensor | None] = {}
        self.tables: dict[Rotary, Any] = {}

    def __call__(self, index: int, block: Block) -> dict[str, Any]:
        """Return the arguments of block ``index``, which is the next to be called."""
        self.cache.block = index
        given = {name: self._value(block, what) for name, what in block.arguments.items()}
        if block.of_tokens:
            given |= self.token_inputs.of(self.step, len(self.h))[index]
        return given

    def _value(self, block: Block, what: Any) -> Any:
        if isinstance(what, Rotary):
            if what not in self.tables:
                self.tables[what] = what.module(**self._constants(what.arguments))
            return self.tables[what]
        if what == MASK:
            if block.window not in self.masks:
                self.masks[block.window] = self._mask(block.window)
            return self.masks[block.window]
        if what == CACHE:
            return self.cache if self.cache.used else None
        if what == SHARED:
            return self.shared
        if what == OF_TOKENS:
            return None  # see __call__
        return self.positions if what == POSITIONS else what

    def _constants(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        anew = {STATE: self.h, POSITIONS: self.positions}
        return {
            name: anew.get(what, what) if isinstance(what, str) else what
            for name, what in arguments.items()
        }

    def _mask(self, window: int | None) -> Tensor | None:
        seen = _mask(self.step, self.cache.end, window, may_leave_out=not self.eager)
        if seen is None:
            return None
        seen = seen.expand(len(self.h), -1, -1, -1)
        if not self.eager:
            return seen
        lowest = torch.finfo(self.h.dtype).min
        return torch.zeros_like(seen, dtype=self.h.dtype).masked_fill(~seen, lowest)


def _mask(step: Step, end: int, window: int | None, *, may_leave_out: bool) -> Tensor | None:
    """Return (B or 1, 1, T, S), True where a query attends; None if causal attention suffices."""
    positions, real = step.positions, step.real
    length = positions.shape[1]
    same_for_all = step.cache is None or length == end or positions.shape == (1, 1)
    if may_leave_out and real is None and same_for_all and (window is None or end <= window):
        return None
    device = positions.device
    if step.cache is not None:  # a key is in the slot of its position: see kv_cache.py
        back = positions[..., None] - torch.arange(end, device=device)  # (B or 1, T, S)
        seen = back >= 0
    else:
        back = positions[:, :, None] - positions[:, None]
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]
    if window is not None:
        seen = seen & (back < window)
    if real is not None and step.cache is None:
        own = torch.eye(length, dtype=torch.bool, device=device)  # padding attends to itself
        seen = seen & real[:, None] | own
    return seen[:, None]


class _AtFirstBlockError(Exception):
    """Raised when a forward pass reaches the first block; it carries the state."""

    def __init__(self, state: Tensor) -> None:
        self.state = state


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _AtFirstBlockError(next(iter(named(module, args, kwargs).values())))
