"""Prefill: run a prompt through the model, in parts, and return the logits of the next token.

A long prompt runs in chunks, so that the memory of a call is bounded. A chunk may stop after any
block and go on later, so that rows that decode meanwhile need not wait for it. The numbers of a
prompt depend on the chunks, which depend only on its length, and not on where they stop nor on
other prompts.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from offramp.generation.transfer import on_device
from offramp.models.base import FEW_TOKENS, EarlyExitModel, Step
from offramp.models.kv_cache import KVCache

PREFILL_CHUNK = 512
"""Largest number of tokens of a prompt that run in one call."""


class Prefill:
    """The prefill of one prompt at full depth, into one row of the cache.

    ``rows`` (1,) is the row; None in a cache of one row. Only the logits of the last token are
    wanted. Therefore the last block, and all blocks above ``complete_from``, run for this token
    only; of the other tokens their keys and values are projected. The last block of a prompt of
    few tokens runs for all of them, since this costs no more.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        cache: KVCache,
        prompt: list[int],
        *,
        rows: Int[Tensor, " 1"] | None = None,
    ) -> None:
        self.model, self.cache, self.rows = model, cache, rows
        self.logits: Float[Tensor, "1 V"] | None = None
        "The logits after the prompt; None until all of it has run."
        self._prompt, self._first, self._layer = prompt, 0, 0
        below = model.num_layers - (len(prompt) > FEW_TOKENS)
        self._shared = min(model.complete_from, below)
        "The blocks that run for all tokens."
        self._h: Tensor | None = None

    @torch.inference_mode()
    def run(self, budget: float) -> float:
        """Run blocks of the prompt; stop before more than ``budget`` blocks ran, counted by token.

        At least one block of a chunk runs. Returns what is left of the budget.
        """
        while budget > 0 and self.logits is None:
            if self._h is None:
                ids = self._prompt[self._first : self._first + PREFILL_CHUNK]
                self._step = self._step_of(self._first, len(ids))
                self._h = self.model.embed(self._tensor(ids), step=self._step)
                self._layer = 0
            tokens = self._h.shape[1]
            more = self._shared - self._layer
            if budget < tokens * more:
                more = max(1, int(budget) // tokens)
            stop = self._layer + more
            self._h = self.model.run_layers(self._h, self._layer, stop, step=self._step)
            self._layer = stop
            budget -= tokens * max(more, 1)
            if stop == self._shared:
                self._end_chunk(self._h)
        return budget

    def _end_chunk(self, h: Float[Tensor, "1 T D"]) -> None:
        model, layers = self.model, self.model.num_layers
        if self._shared < layers:
            model.project_kv(h, self._shared, model.cache_layers, step=self._step)
        self._first, self._h = self._first + h.shape[1], None
        if self._first < len(self._prompt):
            return
        h = h[:, -1:]
        if self._shared < layers:
            last = self._step_of(len(self._prompt) - 1, 1)
            h = model.run_layers(h, self._shared, layers, step=last)
        self.logits = model.unembed(h, layers)[:, 0]

    def _step_of(self, first: int, tokens: int) -> Step:
        end = first + tokens
        positions = torch.arange(first, end, device=self.model.device)
        return Step(positions=positions[None], cache=self.cache, rows=self.rows, end=end)

    def _tensor(self, ids: list[int]) -> Int[Tensor, "1 T"]:
        return on_device([ids], self.model.device)
