"""The cost model: the seconds that a decoded token takes, from the parts of a model that ran.

A part of a model (a block, the keys and values of a block, an exit's head, the evaluation of an
exit's confidence) has bytes of weights that each call reads, and FLOPs for each of its tokens. No
call is faster than bytes / bandwidth, or than FLOPs / the machine's peak. How near a part comes to
that limit, by the tokens of a call, is measured on the machine (timer.py). The time of a text
follows from what its decoder ran (``Work``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offramp.models.work import Work


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a model on this machine."""

    bytes: float
    "Bytes of its weights, which each call reads once."
    flops: float
    "FLOPs for one token."
    seconds: Mapping[int, float]
    "Measured seconds of a call, by the call's number of tokens."

    def of(self, tokens: int) -> float:
        """Return the seconds of a call of ``tokens`` tokens.

        They are interpolated between measurements, and proportional to the tokens beyond the
        largest measurement.
        """
        known = sorted(self.seconds)
        if tokens > known[-1]:
            return self.seconds[known[-1]] * tokens / known[-1]
        return float(np.interp(tokens, known, [self.seconds[count] for count in known]))

    def bytes_per_second(self) -> float:
        """Bytes per second at which a call of one token reads the weights."""
        return self.bytes / self.seconds[min(self.seconds)]

    def faster(self, other: "Part") -> "Part":
        """Return the part with the shorter of the two times of each call."""
        seconds = {count: min(took, other.seconds[count]) for count, took in self.seconds.items()}
        return replace(self, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How long each part of a model takes on this machine."""

    block: Part
    "One block: the mean of all."
    keys_values: Part
    """Only the keys and values of one block that writes any (the mean of these blocks), in the call
    of a running token if the model can."""
    heads: Mapping[int, Part]
    "The head of an exit, by exit layer."
    evaluations: Mapping[int, Part]
    "The confidence of an exit, with the head or gate that it reads, by exit layer."
    drafts: Mapping[int, Part]
    "The max_prob of an exit that drafts, by the head for the draft vocabulary, by exit layer."
    bandwidth: float
    "Bytes per second at which the machine reads its memory."
    weights: float
    "Bytes of the blocks and the last head."
    token_seconds: float = 0.0
    """Seconds that a new token takes in addition to all parts, such as to choose and decode it.
    Below 0 where decoding runs parts in fewer calls than they were timed in."""
    evaluation_seconds: float = 0.0
    "The same of an evaluation, such as to split the batch."

    def seconds(self, work: Work, tokens: int) -> float:
        """Return the predicted seconds of ``work`` that generated ``tokens`` new tokens."""
        parts = [
            *((self.block, of, count) for of, count in work.blocks.items()),
            *((self.keys_values, of, count) for of, count in work.keys_values.items()),
            *((self.heads[layer], of, count) for (layer, of), count in work.heads.items()),
            *(
                (self.evaluations[layer], of, count)
                for (layer, of), count in work.evaluations.items()
            ),
            *((self.drafts[layer], of, count) for (layer, of), count in work.drafts.items()),
        ]
        run = sum(part.of(each) * count for part, each, count in parts)
        evaluated = sum(work.evaluations.values())
        return run + tokens * self.token_seconds + evaluated * self.evaluation_seconds

    def faster(self, other: "Clock") -> "Clock":
        """Return a clock with the shorter of the two times of each part.

        Other work on the machine can only make a part slower.
        """

        def each(mine: Mapping[int, Part], theirs: Mapping[int, Part]) -> dict[int, Part]:
            return {layer: part.faster(theirs[layer]) for layer, part in mine.items()}

        return replace(
            self,
            block=self.block.faster(other.block),
            keys_values=self.keys_values.faster(other.keys_values),
            heads=each(self.heads, other.heads),
            evaluations=each(self.evaluations, other.evaluations),
            drafts=each(self.drafts, other.drafts),
        )

    def pinned(self, work: Work, tokens: int, seconds: float) -> "Clock":
        """Return the clock, corrected so that it predicts ``seconds`` for a run at full depth.

        The seconds that the parts do not explain are divided among the tokens or, if every exit
        was evaluated and no token left, among the evaluations. They may be below 0, but a token
        and an evaluation, with its part, take no less than no time.
        """
        rest = seconds - self.seconds(work, tokens)
        if evaluated := sum(work.evaluations.values()):
            own = sum(self.evaluations[at].of(n) * c for (at, n), c in work.evaluations.items())
            added = self.evaluation_seconds + max(rest, -own) / evaluated
            return replace(self, evaluation_seconds=added)
        heads = sum(self.heads[at].of(n) * count for (at, n), count in work.heads.items())
        return replace(self, token_seconds=self.token_seconds + max(rest, -heads) / tokens)

    def about(self) -> dict[str, Any]:
        """Return figures of each part: bytes, FLOPs, milliseconds, share of the bandwidth."""
        named = {
            "block": self.block,
            "keys and values": self.keys_values,
            **{f"head {layer}": part for layer, part in self.heads.items()},
            **{f"confidence {layer}": part for layer, part in self.evaluations.items()},
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
        del parts["keys and values"]["share_of_bandwidth"]  # they read no weights
        return parts | {
            "token": {"ms": 1000 * self.token_seconds},
            "exit decision": {"ms": 1000 * self.evaluation_seconds},
        }
