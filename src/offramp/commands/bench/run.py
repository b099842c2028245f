"""One interleaved run of every method on the same prompts, beside what the cost model predicts."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from statistics import median
from typing import Any

from offramp.commands.bench.clocks import Clocks, evaluated_at_full_depth, measure_clocks
from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.formats import in_formats
from offramp.commands.bench.llama import LlamaFile, find_gguf, llama_methods, missing_extra
from offramp.commands.bench.llama_process import LlamaCrashError
from offramp.commands.bench.plan import OnNote, Plan, check_options, plan_of
from offramp.commands.bench.rounds import OnRun, Rounds
from offramp.commands.bench.rows import Compared, rows_of
from offramp.commands.bench.summary import summary_of
from offramp.commands.bench.task import Task, in_batches, long_prompts_of, prompts_of
from offramp.commands.text import read_text, windows
from offramp.environment import environment
from offramp.evaluation.timer import measure_bandwidth
from offramp.models.open import OpenedModel

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
    """What ``offramp bench`` writes: a row for each method, and what the machine allows.

    ``on_run`` is called before each run, as in ``Rounds``, and before them with what is prepared,
    as 0 of 1.
    """

    def note(text: str) -> None:
        on_run(0, 1, text)

    failed = missing_extra(opened, config)
    try:
        gguf = find_gguf(opened, config)
    except LlamaCrashError as error:
        gguf, failed["llama_cpp"] = None, str(error)
    tasks = tasks_of(opened, corpus_name, config, note)
    about = {
        "dtype": tasks[0].weights,
        "untrained": not opened.exits_trained,
        "bos": bool(opened.first_tokens),
        "config": asdict(config),
        "environment": environment(str(opened.model.device)),
    }
    with ExitStack() as stack:
        plan = plan_with(tasks, gguf, stack, note)
        plan.failed.update(failed)
        content = time_tasks(
            tasks, plan, on_run=on_run, on_round=lambda so_far: on_round(so_far | about)
        )
    return content | about


def tasks_of(
    opened: OpenedModel,
    corpus_name: str,
    config: BenchConfig,
    note: OnNote = lambda text: None,
) -> list[Task]:
    """Return the task of each weight format, all of which decode the same prompts."""
    ids = read_text(opened, corpus_name).ids
    place: dict[str, Any] = {
        "max_length": opened.model.max_length,
        "first_tokens": opened.first_tokens,
    }
    prompts = in_batches(prompts_of(ids, corpus_name, config, **place), config.batch_size)
    long_prompts = long_prompts_of(ids, corpus_name, config, **place)
    measured = list(windows(opened, ids[: config.ppl_tokens + 1])) if config.ppl_tokens else []
    tasks = [
        Task(
            model=each.model,
            fitted=each.fitted,
            config=config,
            prompts=prompts,
            weights=weights,
            long_prompts=long_prompts,
            windows=measured,
        )
        for weights, each in in_formats(opened, config.weights, note).items()
    ]
    check_options(tasks[0])
    return tasks


def plan_with(
    tasks: Sequence[Task],
    gguf: LlamaFile | None,
    stack: ExitStack,
    note: OnNote = lambda text: None,
) -> Plan:
    """Return every method, those of llama.cpp last; ``stack`` ends what they need."""
    plan = plan_of(tasks, note)
    if gguf is None:
        return plan
    first = tasks[0]
    note("llama.cpp: " + ", ".join(first.config.llama_cpp))
    methods, failed = llama_methods(gguf, first.config, windows=first.windows, stack=stack)
    return Plan(methods=[*plan.methods, *methods], failed=plan.failed | failed)


def time_tasks(
    tasks: Sequence[Task], plan: Plan, *, on_run: OnRun, on_round: OnRound
) -> dict[str, Any]:
    """Time every method, and the parts of the models before and after.

    Other work on the machine only adds time, so the parts count by the shorter of both times.
    """
    bandwidth = measure_bandwidth(tasks[0].model.device)
    rounds = Rounds(tasks[0], plan, on_run=on_run)
    clocks = {}
    for task in tasks:
        on_run(0, 1, f"{task.weights}: times of the parts")
        clocks[task.weights] = measure_clocks(task, bandwidth)

    def tell() -> None:
        if all(each.samples for each in rounds.full):
            pinned = {
                full.method.weights: clocks[full.method.weights].pinned(full.every, {})
                for full in rounds.full
            }
            on_round(_content(tasks, rounds, pinned, unfinished=True))

    try:
        rounds.run(tell)
    except KeyboardInterrupt:
        tell()
        raise
    final = {}
    for task, full in zip(tasks, rounds.full, strict=True):
        again = measure_clocks(task, bandwidth)
        evaluated = evaluated_at_full_depth(task)
        final[task.weights] = clocks[task.weights].faster(again).pinned(full.every, evaluated)
    return _content(tasks, rounds, final, unfinished=False)


def _content(
    tasks: Sequence[Task], rounds: Rounds, clocks: dict[str, Clocks], *, unfinished: bool
) -> dict[str, Any]:
    bandwidth = median(rounds.bandwidths)
    compared = Compared.of(rounds.timed)
    formats = {weights: _format(each.reading(bandwidth)) for weights, each in clocks.items()}
    return {
        "unfinished": unfinished,
        "rows": [asdict(row) for row in rows_of(compared, clocks, tasks[0].model.num_layers)],
        "summary": [asdict(ratio) for ratio in summary_of(compared)],
        "bandwidth_gb_s": bandwidth / 1e9,
        **formats[tasks[0].weights],
        "formats": formats,
        "failed": rounds.failed,
    }


def _format(clocks: Clocks) -> dict[str, Any]:
    """What the machine allows a weight format, and its parts by the first confidence measure."""
    clock = next(iter(clocks.exits.values()))
    return {
        "limit_tokens_per_s": clock.bandwidth / clocks.weights.full_depth,
        "weights_gb": clocks.weights.full_depth / 1e9,
        "parts": clock.about(),
    }
