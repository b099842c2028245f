"""What a decoded token takes in seconds: the cost model, pinned to the clock.

Every part of a model (a block, the keys and values of a block, an exit's head, the question
whether to leave) has bytes of weights that one call reads, and FLOPs for each of its tokens. No
call is faster than bytes / bandwidth, or than FLOPs / the machine's peak. How near a part comes
to that, for how many tokens at once, is measured on the machine; what a decoder then takes
follows from what it asked for (``Work``).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.evaluation.cost import model_cost
from offramp.exits.confidence import CONFIDENCE, Confidence, ExitView, confidence_named
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.models.base import EarlyExitModel, Step, fills_beside
from offramp.models.work import Work

TOKENS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
"""Tokens of a call at which a part is measured."""
BANDWIDTH_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a model on this machine."""

    bytes: float
    "Of its weights, which each call reads once."
    flops: float
    "Of one token."
    seconds: Mapping[int, float]
    "Of a call, by its tokens."

    def of(self, tokens: int) -> float:
        """Seconds of a call, interpolated; beyond what was measured, in proportion."""
        known = sorted(self.seconds)
        if tokens > known[-1]:
            return self.seconds[known[-1]] * tokens / known[-1]
        return float(np.interp(tokens, known, [self.seconds[count] for count in known]))

    def bytes_per_second(self) -> float:
        """At which a call of one token reads its weights."""
        return self.bytes / self.seconds[min(self.seconds)]

    def faster(self, other: "Part") -> "Part":
        """The same part with the shorter of both times."""
        seconds = {count: min(took, other.seconds[count]) for count, took in self.seconds.items()}
        return replace(self, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A model's parts on this machine."""

    block: Part
    "The mean of the blocks."
    keys_values: Part
    "Of tokens of which only these are made: beside one that runs, where the model can."
    heads: Mapping[int, Part]
    "By exit layer."
    questions: Mapping[int, Part]
    "Confidence asked at an exit, with the head or gate that it reads, by exit layer."
    drafts: Mapping[int, Part]
    "Of a draft: max_prob by the head for the draft vocabulary."
    bandwidth: float
    "Bytes a second at which the machine reads its memory."
    weights: float
    "Bytes of the blocks and the last head."
    token_seconds: float = 0.0
    "What a new token takes beside all parts: choosing it, its text."
    question_seconds: float = 0.0
    "What a question takes beside the answer: who leaves, who goes on."

    def seconds(self, work: Work, tokens: int) -> float:
        """What ``work`` and the choice of so many tokens take."""
        parts = [
            *((self.block, of, count) for of, count in work.blocks.items()),
            *((self.keys_values, of, count) for of, count in work.keys_values.items()),
            *((self.heads[layer], of, count) for (layer, of), count in work.heads.items()),
            *((self.questions[layer], of, count) for (layer, of), count in work.questions.items()),
            *((self.drafts[layer], of, count) for (layer, of), count in work.drafts.items()),
        ]
        run = sum(part.of(each) * count for part, each, count in parts)
        asked = sum(work.questions.values())
        return run + tokens * self.token_seconds + asked * self.question_seconds

    def faster(self, other: "Clock") -> "Clock":
        """Of each part the shorter of two times: other work on the machine only adds to one."""

        def each(mine: Mapping[int, Part], theirs: Mapping[int, Part]) -> dict[int, Part]:
            return {layer: part.faster(theirs[layer]) for layer, part in mine.items()}

        return replace(
            self,
            block=self.block.faster(other.block),
            keys_values=self.keys_values.faster(other.keys_values),
            heads=each(self.heads, other.heads),
            questions=each(self.questions, other.questions),
            drafts=each(self.drafts, other.drafts),
        )

    def pinned(self, work: Work, tokens: int, seconds: float) -> "Clock":
        """The same clock, told what a run at full depth took.

        What the parts do not explain is each token's own; where every exit was asked and nobody
        left, each question's.
        """
        rest = max(0.0, seconds - self.seconds(work, tokens))
        if asked := sum(work.questions.values()):
            return replace(self, question_seconds=self.question_seconds + rest / asked)
        return replace(self, token_seconds=self.token_seconds + rest / tokens)

    def about(self) -> dict[str, Any]:
        """The parts as figures for people: bytes, FLOPs, milliseconds, share of the bandwidth."""
        named = {
            "block": self.block,
            "keys and values": self.keys_values,
            **{f"head {layer}": part for layer, part in self.heads.items()},
            **{f"question {layer}": part for layer, part in self.questions.items()},
            **{f"draft {layer}": part for layer, part in self.drafts.items()},
        }
        parts: dict[str, dict[str, Any]] = {
            name: {
                "bytes": part.bytes,
                "flops": part.flops,
                "ms": {str(n): 1000 * seconds for n, seconds in part.seconds.items()},
                "share_of_bandwidth": part.bytes_per_second() / self.bandwidth,
            }
            for name, part in named.items()
        }
        del parts["keys and values"]["share_of_bandwidth"]  # they read no weights of their own
        return parts | {
            "token": {"ms": 1000 * self.token_seconds},
            "asking": {"ms": 1000 * self.question_seconds},
        }


def measure_bandwidth(device: torch.device | str = "cpu", *, rounds: int = 5) -> float:
    """Bytes a second: the median of reading 1 GB."""
    x = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    return BANDWIDTH_BYTES / _seconds(lambda: x.sum().item(), rounds)


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
    """Time every part for a few tokens that stand behind ``context`` others.

    ``rows``: each in a row of its own, as in a batch. Before each part of an exit the blocks
    below it run, as in decoding, so that its weights come from where they would come from then.
    """
    context = max(1, min(context, model.max_length - max(TOKENS)))
    sizes = [count for count in TOKENS if rows or context + count <= model.max_length]
    cost = model_cost(model, context=float(context), fitted=fitted)
    measure, early = confidence_named(confidence), model.exit_layers[:-1]
    item = model.make_cache(1, 1).keys.element_size()
    blocks, keys_values = {}, {}
    for tokens in sizes:
        h, step = _some(model, context, (tokens, 1) if rows else (1, tokens))
        whole = partial(model.run_layers, h, 0, model.num_layers, step=step)
        blocks[tokens] = _seconds(whole, rounds) / model.num_layers
    for tokens in sizes:
        if fills_beside(model, tokens + 1) and tokens < sizes[-1]:
            h, step = _some(model, context, (tokens + 1, 1) if rows else (1, tokens + 1))
            beside = partial(_beside_one, model, h, step)
            seconds = _seconds(beside, rounds) / model.num_layers - blocks[1]
            keys_values[tokens] = max(seconds, 1e-9)
        else:
            h, step = _some(model, context, (tokens, 1) if rows else (1, tokens))
            only = partial(_keys_values_anew, model, h, step)
            keys_values[tokens] = _seconds(only, rounds) / model.num_layers

    def part(flops: float, seconds: Mapping[int, float]) -> Part:
        return Part(bytes=flops / 2 * item, flops=flops, seconds=seconds)

    def at_exit(layer: int, ask: Callable[[Tensor], object], counts: Sequence[int]) -> Any:
        one, step = _some(model, context, (1, 1))
        below = partial(model.run_layers, one, 0, layer, step=step)
        states = {tokens: _some(model, context, (tokens, 1))[0] for tokens in counts}
        return {n: _seconds(partial(ask, h), rounds, before=below) for n, h in states.items()}

    def logits(layer: int, h: Tensor) -> None:
        model.unembed(h, layer)

    def question(asked: Confidence, layer: int, vocab: Tensor | None, h: Tensor) -> None:
        view = ExitView(
            exit_layer=layer,
            logits=lambda: model.unembed(h, layer, vocab=vocab)[:, 0],
            state=h[:, 0],
            previous_state=h[:, 0],
            fitted=fitted,
        )
        asked.score(view).tolist()

    few, drafting = TOKENS if rows else TOKENS[:6], CONFIDENCE["max_prob"]
    vocab = fitted.draft_vocab
    share = 1.0 if vocab is None else len(vocab) / model.vocab_size
    asked = dict(cost.heads) if measure.needs_head else dict.fromkeys(early, 0.0)
    if measure.needs_gate:
        asked = {layer: cost.gate(confidence, layer) for layer in early}
    return Clock(
        block=part(sum(cost.layers) / model.num_layers, blocks),
        keys_values=part(sum(cost.keys_values) / model.num_layers, keys_values),
        heads={
            n: part(cost.heads[n], at_exit(n, partial(logits, n), few)) for n in model.exit_layers
        },
        questions={
            n: part(asked[n], at_exit(n, partial(question, measure, n, None), few)) for n in early
        },
        drafts={
            n: part(
                cost.heads[n] * share,
                at_exit(n, partial(question, drafting, n, vocab), (1,)),
            )
            for n in early
        },
        bandwidth=bandwidth,
        weights=model_cost(model, context=1.0).full / 2 * item,
    )


def _beside_one(model: EarlyExitModel, h: Tensor, step: Step) -> None:
    """All tokens but the last are done and owe keys and values; as in decoding, in a call anew."""
    active = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
    active[-1, -1] = True
    model.run_layers(h, 0, model.num_layers, step=replace(step), active=active)


def _keys_values_anew(model: EarlyExitModel, h: Tensor, step: Step) -> None:
    """As in decoding, where such a call has places of its own."""
    model.project_kv(h, 0, model.num_layers, step=replace(step))


def _some(model: EarlyExitModel, context: int, shape: tuple[int, int]) -> tuple[Tensor, Step]:
    """Tokens behind ``context`` others, (B, T), as the first block gets them."""
    positions = torch.arange(context, context + shape[1], device=model.device)
    step = Step(
        positions=positions.expand(shape), cache=model.make_cache(shape[0], context + shape[1])
    )
    ids = torch.zeros(shape, dtype=torch.long, device=model.device)
    return model.embed(ids, step=step), step


def _seconds(
    part: Callable[[], object], rounds: int, *, before: Callable[[], object] | None = None
) -> float:
    """Median of so many rounds, after one that does not count."""
    found = []
    for _ in range(rounds + 1):
        if before:
            before()
        _wait()
        start = time.perf_counter()
        part()
        _wait()
        found.append(time.perf_counter() - start)
    return median(found[1:])


def _wait() -> None:
    """A GPU is told what to do and goes on by itself."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
