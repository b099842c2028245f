"""Runs the methods of ``offramp bench`` in turn, so that other work on the machine meets them all.

A peer that raises an error or gives another number of tokens is left out, with the reason.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from offramp.commands.bench.methods import Sample
from offramp.commands.bench.plan import Plan, reason
from offramp.commands.bench.rows import Timed
from offramp.commands.bench.task import Task
from offramp.evaluation.timer import measure_bandwidth

Value = TypeVar("Value")
SLOW_BATCHES = 2
"""Number of batches that a slow peer decodes, once each."""
OnRun = Callable[[int, int, str], None]
"""Called before each run with (runs done, runs in all, the method that is next)."""


class Rounds:
    """Runs the methods of a plan in turn on every batch of a task, ``config.repeats`` times.

    ``timed`` are the methods that run here, with their samples so far, and ``failed`` has the
    reasons of the others by their names. ``bandwidths`` are measured before each round.
    """

    def __init__(self, task: Task, plan: Plan, *, on_run: OnRun) -> None:
        self.task, self.on_run, self.failed = task, on_run, dict(plan.failed)
        self.timed = [Timed(method) for method in plan.methods]
        self.full = [each for each in self.timed if each.method.name == "full"]
        self.bandwidths: list[float] = []

    def run(self, on_round: Callable[[], None]) -> None:
        """Run everything; ``on_round`` is called after each batch that every method decoded."""
        total, done = sum(len(self._due(*place)) for place in self._places()), 0
        for each in list(self.timed):  # a first call, which also prepares what later calls reuse
            if not each.method.slow:
                self._attempt(each, partial(self._sample, each, 0))
        for each in list(self.timed):
            if each.method.ppl is not None:
                self.on_run(done, total, f"{each.method.name}: PPL")
                each.ppl = self._attempt(each, each.method.ppl)
        for place in self._places():
            self.bandwidths.append(measure_bandwidth(self.task.model.device, rounds=2))
            for each in self._due(*place):
                if each in self.timed:
                    self.on_run(done, total, each.method.name)
                    sample = self._attempt(each, partial(self._sample, each, place[1]))
                    if sample:
                        sample = replace(sample, bandwidth=self.bandwidths[-1])
                        each.samples.setdefault(place[1], []).append(sample)
                done += 1
            on_round()

    def _places(self) -> list[tuple[int, int]]:
        batches = range(len(self.task.prompts))
        return [
            (repeat, number) for repeat in range(self.task.config.repeats) for number in batches
        ]

    def _due(self, repeat: int, number: int) -> list[Timed]:
        """The methods that decode this batch in this repeat."""
        few = repeat == 0 and number < SLOW_BATCHES
        return [each for each in self.timed if few or not each.method.slow]

    def _attempt(self, each: Timed, action: Callable[[], Value]) -> Value | None:
        """Return the result of an action; None for a peer that fails, which is then left out."""
        try:
            return action()
        except (Exception, SystemExit) as error:  # it may not support the installed versions
            if not each.method.foreign:
                raise
            self.failed[each.method.name] = reason(error)
            self.timed.remove(each)
            return None

    def _sample(self, each: Timed, number: int) -> Sample:
        """Decode a batch, and time the longer prompt that goes with it."""
        method, batch = each.method, self.task.prompts[number]
        sample = method.run(batch)
        if method.foreign:
            _check_sample(sample, rows=len(batch), new=self.task.config.max_new_tokens)
        if method.prefill is None or not self.task.long_prompts:
            return sample
        prompt = self.task.long_prompts[number]
        seconds = method.prefill(prompt)
        return replace(sample, prefill_seconds=seconds, prefill_tokens=len(prompt))


def _check_sample(sample: Sample, *, rows: int, new: int) -> None:
    got = sorted({len(row) for row in sample.tokens})
    if len(sample.tokens) != rows or got != [new]:
        raise ValueError(f"expected {new} new tokens for each of {rows} prompts, got {got}")
    if not sample.seconds > 0:
        raise ValueError(f"expected a duration above 0 s, got {sample.seconds:g}")
