"""What a Hugging Face model derives from the token ids for each of its blocks.

Blocks of Gemma 3n and 4 get numbers of their own for each token, which depend only on its id. The
model computes them before its first block. They are therefore read in a pass of the model in which
every block returns its input.

A call with the step of ``embed`` finds them in the memo of the step. Any other call, such as one
for tokens whose keys and values were deferred, needs the ids of its tokens again: the cache
remembers the id at each position, in each row.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.models.base import Step
from offramp.models.huggingface.arguments import Block
from offramp.models.huggingface.calls import accepted

OfBlock = dict[str, Tensor]
"""The numbers (B, T, P) of one block by the name of its argument."""


class TokenInputs:
    """The input of the first block, and what the model derives from ids for every block."""

    def __init__(self, lm: Any, blocks: Sequence[Block]) -> None:
        self.lm = lm
        self.blocks = tuple(blocks)
        names = [list(inspect.signature(block.module.forward).parameters) for block in blocks]
        self.places = [
            {name: known.index(name) for name in block.of_tokens}
            for block, known in zip(blocks, names, strict=True)
        ]
        self.needed = any(self.places)
        "Whether blocks need anything that depends on ids besides the state."

    def embed(self, input_ids: Tensor, step: Step) -> Tensor:
        """Return the input of the first block for ids (B, T), and keep what the others need."""
        state, step.memo[self, "inputs"] = self._read(input_ids, step.positions)
        if step.cache is not None:
            slots = step.positions.expand(len(input_ids), -1)
            if step.real is not None:
                slots = torch.where(step.real, slots, step.cache.capacity)
            self._ids(step)[self._rows(step, len(input_ids)), slots] = input_ids
        return state

    def of(self, step: Step, rows: int) -> list[OfBlock]:
        """Return what each block needs for the tokens of a step of so many rows."""
        found: list[OfBlock] | None = step.memo.get((self, "inputs"))
        if found is None:
            ids = self._known(step, rows)
            _, found = self._read(ids, step.positions)
            step.memo[self, "inputs"] = found
        return found

    def _known(self, step: Step, rows: int) -> Tensor:
        """Return the ids (B, T) of the tokens of a step, which its cache remembers."""
        positions = step.positions.expand(rows, -1)
        if step.cache is not None:
            ids = self._ids(step)[self._rows(step, rows), positions]
            if step.real is not None:
                ids = torch.where(step.real, ids, 0)
            if not (ids < 0).any():
                return ids
        raise ConfigError(
            "step: expected tokens for which embed was called with the same step or cache, since "
            "the blocks need their ids, got others"
        )

    def _ids(self, step: Step) -> Tensor:
        """Return the ids (B, capacity + 1) that the cache remembers; -1 where there is none."""
        assert step.cache is not None
        _, rows, _, slots, _ = step.cache.keys.shape
        kept: Tensor | None = step.cache.memo.get((self, "ids"))
        if kept is None:
            with torch.inference_mode(False):  # like the cache, it lives longer than this call
                kept = torch.full((rows, slots), -1, device=step.cache.keys.device)
            step.cache.memo[self, "ids"] = kept
        return kept

    def _rows(self, step: Step, rows: int) -> Tensor:
        named = step.rows
        if named is None:
            named = torch.arange(rows, device=step.positions.device)
        return named[:, None]

    def _read(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, list[OfBlock]]:
        arguments = accepted(
            self.lm,
            input_ids=input_ids,
            position_ids=positions.repeat(len(input_ids) // len(positions), 1),
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
        )
        states: list[Tensor] = []
        found: list[OfBlock] = []
        with _passing(self, states, found):
            try:
                self.lm(**arguments)
            except _AtLastBlockError:
                return states[0], found
        raise AssertionError("the last block was not reached")

    def note(
        self, index: int, states: list[Tensor], found: list[OfBlock], *args: Any, **kwargs: Any
    ) -> Any:
        """Take the arguments of block ``index``, and return its input in place of its output."""
        places = self.places[index].items()
        state = args[0] if args else next(iter(kwargs.values()))
        states.append(state)
        found.append({name: kwargs[name] if name in kwargs else args[at] for name, at in places})
        if index + 1 == len(self.blocks):
            raise _AtLastBlockError
        return (state,) if self.blocks[index].gives_tuple else state


@contextmanager
def _passing(inputs: TokenInputs, states: list[Tensor], found: list[OfBlock]) -> Iterator[None]:
    """Replace the computation of every block by ``TokenInputs.note``."""
    modules: list[nn.Module] = [block.module for block in inputs.blocks]
    before = [vars(module).get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            vars(module)["forward"] = partial(inputs.note, index, states, found)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


class _AtLastBlockError(Exception):
    """Raised when a pass reaches the last block, to skip what comes after it."""
