"""Measure the time of each part of a model on this machine, for the cost model (clock.py)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from offramp.evaluation.clock import Clock, Part
from offramp.evaluation.cost import ModelCost, model_cost
from offramp.evaluation.stopwatch import added_seconds, seconds_of
from offramp.exits.confidence import CONFIDENCE, Confidence, ExitView, confidence_named
from offramp.exits.gate import GATE_KINDS, NOTHING_FITTED, FittedExits
from offramp.models.base import EarlyExitModel, Step
from offramp.models.huge_pages import use_huge_pages
from offramp.models.router import GateRule, RouterSpec
from offramp.models.weight_bytes import bytes_per_weight
from offramp.models.work import Work

TOKENS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
"""Numbers of tokens per call for which a part is timed."""
_FEW = 6  # of them, for the last head if the tokens are not rows of a batch: it verifies drafts
BANDWIDTH_BYTES = 1 << 30


def measure_bandwidth(device: torch.device | str = "cpu", *, rounds: int = 5) -> float:
    """Return the bytes per second at which the machine reads 1 GB of memory (median).

    On a CPU the memory is in huge pages, as weights are, where the system has them.
    """
    x = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    use_huge_pages([x])
    return BANDWIDTH_BYTES / seconds_of(lambda: x.sum().item(), rounds)


@torch.inference_mode()
def measure_clock(
    model: EarlyExitModel,
    *,
    context: int,
    bandwidth: float,
    confidence: str = "max_prob",
    fitted: FittedExits = NOTHING_FITTED,
    rows: bool = False,
    rounds: int = 5,
) -> Clock:
    """Time every part of a model for a few tokens that follow ``context`` others.

    With ``rows`` each token is in its own row, as in a batch. ``bandwidth`` is the result of
    ``measure_bandwidth``. Each time is the median of ``rounds``.
    """
    timer = Timer.of(model, context=context, fitted=fitted, rows=rows, rounds=rounds)
    block, early = timer.block(), model.exit_layers[:-1]
    one_call = timer.whole(1)
    return Clock(
        block=block,
        keys_values=timer.keys_values(one_call),
        heads={layer: timer.head(layer) for layer in model.exit_layers},
        evaluations=timer.evaluations(confidence),
        drafts={layer: timer.draft(layer) for layer in early},
        bandwidth=bandwidth,
        weights=model_cost(model, context=1.0).full / 2 * timer.item_bytes,
    )


@torch.inference_mode()
def measure_evaluations(
    model: EarlyExitModel,
    *,
    context: int,
    confidence: str,
    fitted: FittedExits = NOTHING_FITTED,
    rows: bool = False,
    rounds: int = 5,
) -> dict[int, Part]:
    """Time only the confidence at each exit, as ``measure_clock`` does, by exit layer."""
    timer = Timer.of(model, context=context, fitted=fitted, rows=rows, rounds=rounds)
    return timer.evaluations(confidence)


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Times one part of a model at a time, for a few tokens that follow ``context`` others.

    Before each part of an exit the blocks below the exit run, as in decoding, so that the weights
    of the part come from the memory from which they would come then.
    """

    model: EarlyExitModel
    cost: ModelCost
    context: int
    fitted: FittedExits
    rows: bool
    "Whether each token is in its own row."
    rounds: int

    @classmethod
    def of(
        cls, model: EarlyExitModel, *, context: int, fitted: FittedExits, rows: bool, rounds: int
    ) -> "Timer":
        """Return a timer of tokens that follow ``context`` others, if the model allows so many."""
        context = max(1, min(context, model.max_length - max(TOKENS)))
        cost = model_cost(model, context=float(context), fitted=fitted)
        return cls(model=model, cost=cost, context=context, fitted=fitted, rows=rows, rounds=rounds)

    @property
    def item_bytes(self) -> float:
        """Bytes of one weight."""
        return bytes_per_weight(self.model)

    @property
    def sizes(self) -> list[int]:
        """The numbers of tokens for which blocks are timed."""
        longest = self.model.max_length
        return [count for count in TOKENS if self.rows or self.context + count <= longest]

    def block(self) -> Part:
        """Time one block: the mean of all blocks, without what a call takes that runs none."""
        layers = self.model.num_layers
        seconds = {}
        for tokens in self.sizes:
            none = self.whole(tokens, blocks=0)
            seconds[tokens] = max(self.whole(tokens) - none, 1e-9) / layers
        return self._part(sum(self.cost.layers) / layers, seconds)

    def whole(self, tokens: int, *, blocks: int | None = None) -> float:
        """Return the seconds of a call of the first blocks (default: all)."""
        h, step = self._tokens(tokens)
        last = self.model.num_layers if blocks is None else blocks
        part = partial(self.model.run_layers, h, 0, last, step=step)
        return seconds_of(part, self.rounds)

    def keys_values(self, one_call: float) -> Part:
        """Time the keys and values of pending tokens in one block that writes any.

        If the model computes them in the same call as a running token, only the additional time
        counts. ``one_call`` is the seconds of a call of all blocks for the running token alone.
        """
        sizes, writers = self.sizes, self._writers
        seconds = {}
        for tokens in sizes:
            if self.model.fills_beside(tokens + 1) and tokens < sizes[-1]:
                part = partial(_run_last, self.model, *self._tokens(tokens + 1))
                added = seconds_of(part, self.rounds) - one_call
                seconds[tokens] = max(added / writers, 1e-9)
            else:
                part = partial(_project, self.model, *self._tokens(tokens))
                seconds[tokens] = seconds_of(part, self.rounds) / writers
        return self._part(sum(self.cost.keys_values) / writers, seconds)

    @property
    def _writers(self) -> int:
        """Number of blocks that write keys and values; blocks that share them write none."""
        return max(1, sum(flops > 0 for flops in self.cost.keys_values))

    def head(self, layer: int) -> Part:
        """Time the logits at an exit."""

        def logits(h: Tensor) -> None:
            self.model.unembed(h, layer)

        several = layer == self.model.num_layers and not self.rows
        seconds = self._at_exit(layer, logits, TOKENS[:_FEW] if several else None)
        return self._part(self.cost.heads[layer], seconds)

    def evaluations(self, confidence: str) -> dict[int, Part]:
        """Time the confidence at each exit, with the head or gate that it reads, by exit layer.

        If the model routes tokens itself (models/router.py), gates are timed in the call that
        does so: the seconds that they add to a token, divided among the exits.
        """
        measure, early = confidence_named(confidence), self.model.exit_layers[:-1]
        gates = self._gates_in_router(confidence) if confidence in GATE_KINDS and early else None
        if gates is not None:
            return {layer: self._part(self.cost.gate(confidence, layer), gates) for layer in early}
        found = {}
        for layer in early:
            flops = self.cost.heads[layer] if measure.needs_head else 0.0
            if measure.needs_gate:
                flops = self.cost.gate(confidence, layer)
            seconds = self._at_exit(layer, partial(self._score, measure, layer))
            found[layer] = self._part(flops, seconds)
        return found

    def _gates_in_router(self, confidence: str) -> dict[int, float] | None:
        """Return the seconds that a gate adds to a routed token; None without a router."""
        never = torch.full((1,), torch.inf)
        gates = RouterSpec(
            exits=tuple(
                GateRule(layer=layer, gate=self.fitted.gate(confidence, layer), bounds=never)
                for layer in self.model.exit_layers[:-1]
            ),
            score="gate" if confidence == "gate" else "gain",
        )
        seconds = {}
        for count in TOKENS if self.rows else (1,):
            cache = self.model.make_cache(count, self.context + 2)
            routers = [self.model.router(cache, spec) for spec in (RouterSpec(), gates)]
            steps = [
                partial(
                    router.step,
                    *([0] * count, list(range(count)), [self.context] * count, [0] * count),
                    Work(),
                )
                for router in routers
                if router is not None
            ]
            if len(steps) < len(routers):
                return None
            added = added_seconds(*steps, rounds=3 * self.rounds)
            seconds[count] = max(added / len(gates.exits), 1e-9)
        return seconds

    def draft(self, layer: int) -> Part:
        """Time the max_prob at an exit that drafts, with the head for the draft vocabulary."""
        vocab = self.fitted.draft_vocab
        share = 1.0 if vocab is None else len(vocab) / self.model.vocab_size
        score = partial(self._score, CONFIDENCE["max_prob"], layer, vocab=vocab)
        return self._part(self.cost.heads[layer] * share, self._at_exit(layer, score, (1,)))

    def _part(self, flops: float, seconds: Mapping[int, float]) -> Part:
        return Part(bytes=flops / 2 * self.item_bytes, flops=flops, seconds=seconds)

    def _at_exit(
        self, layer: int, part: Callable[[Tensor], object], counts: Sequence[int] | None = None
    ) -> dict[int, float]:
        """Return the seconds of a part, by tokens, each time after the blocks below the exit.

        By default they are those of the tokens that can be at an exit together: one of each row.
        """
        counts = counts or (TOKENS if self.rows else (1,))
        one, step = _states(self.model, self.context, (1, 1))
        below = partial(self.model.run_layers, one, 0, layer, step=step)
        states = {count: _states(self.model, self.context, (count, 1))[0] for count in counts}
        return {
            count: seconds_of(partial(part, h), self.rounds, before=below)
            for count, h in states.items()
        }

    def _score(
        self, measure: Confidence, layer: int, h: Tensor, *, vocab: Tensor | None = None
    ) -> None:
        view = ExitView(
            exit_layer=layer,
            logits=lambda: self.model.unembed(h, layer, vocab=vocab)[:, 0],
            state=h[:, 0],
            previous_state=h[:, 0],
            fitted=self.fitted,
        )
        measure.score(view).tolist()

    def _tokens(self, count: int) -> tuple[Tensor, Step]:
        return _states(self.model, self.context, (count, 1) if self.rows else (1, count))


def _run_last(model: EarlyExitModel, h: Tensor, step: Step) -> None:
    """Run a block for the last token, and compute the missing keys and values of the others."""
    active = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
    active[-1, -1] = True
    model.run_layers(h, 0, model.num_layers, step=replace(step), active=active)


def _project(model: EarlyExitModel, h: Tensor, step: Step) -> None:
    """Compute only keys and values, with a new step, as in decoding."""
    model.project_kv(h, 0, model.num_layers, step=replace(step))


def _states(model: EarlyExitModel, context: int, shape: tuple[int, int]) -> tuple[Tensor, Step]:
    """Return states (B, T, D) before the first block of tokens that follow ``context`` others."""
    positions = torch.arange(context, context + shape[1], device=model.device)
    step = Step(
        positions=positions.expand(shape), cache=model.make_cache(shape[0], context + shape[1])
    )
    ids = torch.zeros(shape, dtype=torch.long, device=model.device)
    return model.embed(ids, step=step), step
