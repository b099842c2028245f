"""One interleaved run of every method on the same prompts, beside what the cost model predicts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.methods import Sample
from offramp.commands.bench.plan import check_options, methods_of
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


def run_bench(
    opened: OpenedModel,
    corpus_name: str,
    config: BenchConfig,
    *,
    on_run: OnRun = lambda done, total, name: None,
) -> dict[str, Any]:
    """What ``offramp bench`` writes: a row for each method, and what the machine allows."""
    model = opened.model
    prompts = prompts_of(corpus_name, opened.tokenizer, config, max_length=model.max_length)
    task = Task(model=model, fitted=opened.fitted, config=config, prompts=prompts)
    return time_task(task, on_run=on_run) | {
        "dtype": str(opened.dtype).removeprefix("torch."),
        "untrained": not opened.exits_trained,
        "config": asdict(config),
        "environment": environment(str(model.device)),
    }


def time_task(task: Task, *, on_run: OnRun) -> dict[str, Any]:
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
    clock = measure()
    timed, failed = time_methods(task, on_run=on_run)
    full = next(each for each in timed if each.method.name == "full")
    evaluated = _evaluated_at_full_depth(task)
    clock = _pinned(_pinned(clock.faster(measure()), full.every), evaluated)
    bandwidth = median((bandwidth, measure_bandwidth(device)))
    clock = replace(clock, bandwidth=bandwidth)
    return {
        "rows": rows_of(timed, clock, task.model.num_layers),
        "bandwidth_gb_s": bandwidth / 1e9,
        "limit_tokens_per_s": bandwidth / clock.weights,
        "weights_gb": clock.weights / 1e9,
        "failed": failed,
        "parts": clock.about(),
    }


def time_methods(task: Task, *, on_run: OnRun) -> tuple[list[Timed], dict[str, str]]:
    """Run the methods in turn on every batch, ``config.repeats`` times.

    Returns the methods that ran with their samples, and the reasons of the peers that failed, by
    name.
    """
    timed = [Timed(method) for method in methods_of(task)]
    plan = [
        (each, number)
        for repeat in range(task.config.repeats)
        for number in range(len(task.prompts))
        for each in timed
        if not each.method.slow or (repeat == 0 and number < SLOW_BATCHES)
    ]
    for each in timed:  # a first call, which also prepares what later calls reuse, is not timed
        if not each.method.slow:
            each.method.run(task.prompts[0])
    failed: dict[str, str] = {}
    for done, (each, number) in enumerate(plan):
        on_run(done, len(plan), each.method.name)
        if each.method.name in failed:
            continue
        try:
            sample = each.method.run(task.prompts[number])
        except Exception as error:  # another package may not support the installed versions
            if not each.method.foreign:
                raise
            failed[each.method.name] = str(error).partition("\n")[0]
        else:
            each.samples.setdefault(number, []).append(sample)
    return [each for each in timed if each.method.name not in failed], failed


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
