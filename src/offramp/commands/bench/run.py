"""One interleaved run of every method on the same prompts, beside what the cost model predicts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.methods import Sample
from offramp.commands.bench.plan import check_options, plan_of, reason
from offramp.commands.bench.rows import Timed, rows_of
from offramp.commands.bench.task import Task, prompts_of
from offramp.environment import environment
from offramp.evaluation.clock import Clock
from offramp.evaluation.timer import measure_bandwidth, measure_clock
from offramp.models.open import OpenedModel

SLOW_BATCHES = 2
"""Number of batches that a slow peer decodes, once each."""
OnRun = Callable[[int, int, str], None]
"""Called before each run with (runs done, runs in all, the method that is next)."""
OnRound = Callable[[dict[str, Any]], None]
"""Called with the content of the result file, which says that it is unfinished: after each prompt
that every method decoded, and when the run is interrupted."""


def run_bench(
    opened: OpenedModel,
    corpus_name: str,
    config: BenchConfig,
    *,
    on_run: OnRun = lambda done, total, name: None,
    on_round: OnRound = lambda content: None,
) -> dict[str, Any]:
    """What ``offramp bench`` writes: a row for each method, and what the machine allows."""
    model = opened.model
    prompts = prompts_of(
        corpus_name,
        opened.tokenizer,
        config,
        max_length=model.max_length,
        first_tokens=opened.first_tokens,
    )
    task = Task(model=model, fitted=opened.fitted, config=config, prompts=prompts)
    about = {
        "dtype": str(opened.dtype).removeprefix("torch."),
        "untrained": not opened.exits_trained,
        "bos": bool(opened.first_tokens),
        "config": asdict(config),
        "environment": environment(str(model.device)),
    }
    content = time_task(task, on_run=on_run, on_round=lambda so_far: on_round(so_far | about))
    return content | about


def time_task(task: Task, *, on_run: OnRun, on_round: OnRound) -> dict[str, Any]:
    """Time every method, and the parts of the model before and after.

    Other work on the machine only adds time, so the parts count by the shorter of both times.
    """
    check_options(task)
    device, config = task.model.device, task.config
    bandwidth = measure_bandwidth(device)
    measure = partial(
        measure_clock,
        task.model,
        context=config.prompt_tokens + config.max_new_tokens // 2,
        bandwidth=bandwidth,
        confidence=config.confidence,
        fitted=task.fitted,
        rows=config.batch_size > 1,
    )
    rounds = Rounds(task, on_run=on_run)  # which also finds out that an exit is not usable
    clock = measure()

    def tell() -> None:
        if rounds.full.samples:
            pinned = replace(_pinned(clock, rounds.full.every), bandwidth=bandwidth)
            on_round(_content(rounds, pinned, unfinished=True))

    try:
        rounds.run(tell)
    except KeyboardInterrupt:
        tell()
        raise
    evaluated = _evaluated_at_full_depth(task)
    clock = _pinned(_pinned(clock.faster(measure()), rounds.full.every), evaluated)
    clock = replace(clock, bandwidth=median((bandwidth, measure_bandwidth(device))))
    return _content(rounds, clock, unfinished=False)


def _content(rounds: "Rounds", clock: Clock, *, unfinished: bool) -> dict[str, Any]:
    return {
        "unfinished": unfinished,
        "rows": rows_of(rounds.timed, clock, rounds.task.model.num_layers),
        "bandwidth_gb_s": clock.bandwidth / 1e9,
        "limit_tokens_per_s": clock.bandwidth / clock.weights,
        "weights_gb": clock.weights / 1e9,
        "failed": rounds.failed,
        "parts": clock.about(),
    }


class Rounds:
    """Runs the methods in turn on every batch, ``config.repeats`` times.

    ``timed`` are the methods that run here, with their samples so far. A peer that raises an error
    or gives another number of tokens is left out, and ``failed`` has the reason by its name.
    """

    def __init__(self, task: Task, *, on_run: OnRun) -> None:
        plan = plan_of(task)
        self.task, self.on_run, self.failed = task, on_run, plan.failed
        self.timed = [Timed(method) for method in plan.methods]
        self.full = next(each for each in self.timed if each.method.name == "full")

    def run(self, on_round: Callable[[], None]) -> None:
        """Run everything; ``on_round`` is called after each batch that every method decoded."""
        for each in list(self.timed):  # a first call, which also prepares what later calls reuse
            if not each.method.slow:
                self._sample(each, 0)
        total = sum(len(self._due(*place)) for place in self._places())
        done = 0
        for place in self._places():
            for each in self._due(*place):
                if each in self.timed:
                    self.on_run(done, total, each.method.name)
                    if sample := self._sample(each, place[1]):
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

    def _sample(self, each: Timed, number: int) -> Sample | None:
        """Decode a batch; None for a peer that fails, which is then left out."""
        method, batch = each.method, self.task.prompts[number]
        try:
            sample = method.run(batch)
            if method.foreign:
                _check_sample(sample, rows=len(batch), new=self.task.config.max_new_tokens)
        except (Exception, SystemExit) as error:  # it may not support the installed versions
            if not method.foreign:
                raise
            self.failed[method.name] = reason(error)
            self.timed.remove(each)
            return None
        return sample


def _check_sample(sample: Sample, *, rows: int, new: int) -> None:
    got = sorted({len(row) for row in sample.tokens})
    if len(sample.tokens) != rows or got != [new]:
        raise ValueError(f"expected {new} new tokens for each of {rows} prompts, got {got}")
    if not sample.seconds > 0:
        raise ValueError(f"expected a duration above 0 s, got {sample.seconds:g}")


def _evaluated_at_full_depth(task: Task) -> list[Sample]:
    """Runs that evaluate every exit and leave at none: full depth, and what evaluating takes."""
    if not task.early_exits:
        return []
    method = task.method("", threshold=math.inf, confidence=task.config.confidence)
    return [method.run(batch) for _ in range(2) for batch in task.prompts[:8]]


def _pinned(clock: Clock, samples: Sequence[Sample]) -> Clock:
    """The clock pinned to the median of these runs at full depth: see ``Clock.pinned``."""
    found = [
        clock.pinned(sample.work, sample.count, sample.seconds) for sample in samples if sample.work
    ]
    found.sort(key=lambda each: (each.token_seconds, each.evaluation_seconds))
    return found[len(found) // 2] if found else clock
