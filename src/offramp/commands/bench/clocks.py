"""The cost model of one run of ``offramp bench``: a clock for each task and confidence measure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offramp.commands.bench.methods import Method, Sample
from offramp.commands.bench.reads import WeightBytes
from offramp.commands.bench.task import Task
from offramp.evaluation.clock import Clock
from offramp.evaluation.timer import measure_clock, measure_evaluations

_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """The clock of one task: it differs between confidence measures by their evaluations."""

    full: Clock
    "For methods without exits."
    exits: Mapping[str, Clock]
    "By confidence measure."
    weights: WeightBytes
    "Bytes of weights by part."

    def of(self, method: Method) -> Clock:
        """Return the clock of a method."""
        return self.full if method.confidence is None else self.exits[method.confidence]

    def faster(self, other: "Clocks") -> "Clocks":
        """Return the clocks with the shorter of two times of each part."""
        exits = {name: clock.faster(other.exits[name]) for name, clock in self.exits.items()}
        return replace(self, full=self.full.faster(other.full), exits=exits)

    def pinned(self, full: Sequence[Sample], evaluated: Mapping[str, Sequence[Sample]]) -> "Clocks":
        """Return the clocks pinned to runs at full depth: without evaluations, and with them."""
        exits = {
            name: _pinned(_pinned(clock, full), evaluated.get(name, ()))
            for name, clock in self.exits.items()
        }
        return replace(self, full=_pinned(self.full, full), exits=exits)

    def reading(self, bandwidth: float) -> "Clocks":
        """Return the clocks of a machine with this memory bandwidth."""
        exits = {name: replace(clock, bandwidth=bandwidth) for name, clock in self.exits.items()}
        return replace(self, full=replace(self.full, bandwidth=bandwidth), exits=exits)


def measure_clocks(task: Task, bandwidth: float) -> Clocks:
    """Time the parts of a task's model, with the evaluation of each confidence measure."""
    config, (name, *others) = task.config, task.confidences
    about: dict[str, Any] = {
        "context": config.prompt_tokens + config.max_new_tokens // 2,
        "fitted": task.fitted,
        "rows": config.batch_size > 1,
        "rounds": _ROUNDS,
    }
    first = measure_clock(task.model, bandwidth=bandwidth, confidence=name, **about)
    exits = {name: first} | {
        other: replace(
            first, evaluations=measure_evaluations(task.model, confidence=other, **about)
        )
        for other in others
    }
    return Clocks(full=first, exits=exits, weights=WeightBytes.of(task))


def evaluated_at_full_depth(task: Task) -> dict[str, list[Sample]]:
    """Runs that evaluate every exit and leave at none: full depth, and what evaluating takes."""
    if not task.early_exits:
        return {}
    methods = {
        name: task.method("", threshold=math.inf, confidence=name) for name in task.confidences
    }
    return {
        name: [method.run(batch) for _ in range(2) for batch in task.prompts[:8]]
        for name, method in methods.items()
    }


def _pinned(clock: Clock, samples: Sequence[Sample]) -> Clock:
    """The clock pinned to the median of these runs at full depth: see ``Clock.pinned``."""
    found = [
        clock.pinned(sample.work, sample.count, sample.seconds) for sample in samples if sample.work
    ]
    found.sort(key=lambda each: (each.token_seconds, each.evaluation_seconds))
    return found[len(found) // 2] if found else clock
