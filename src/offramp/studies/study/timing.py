"""The time that a study's runs took; apart from study.json, which is the same every time.

A run's seconds are measured while it is done and kept in its folder. Static models are timed in
a step of their own before any run is trained, and ``timing.json`` of the study keeps that; to
summarise is array work on both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from offramp.data import batches, vocabulary_size
from offramp.report.study_json import read_times, write_study
from offramp.report.study_result import RoutedTimes, StaticTime, StudyTimes, TimedPolicy
from offramp.studies.study.done import Done
from offramp.studies.study.evaluate import BATCH, full_pass_seconds
from offramp.studies.study.frontier import FrontierKey
from offramp.studies.study.run import StudyRun
from offramp.training.loop import new_model

TIMES = "timing.json"
PASS_BATCHES, ROUNDS = 8, 3
"""Static models are timed by passes over this many batches, in this many rounds."""


def keep_static_times(
    runs: Sequence[StudyRun], out: Path, *, threads: int, on_timing: Callable[[int, int], None]
) -> None:
    """Time the plain static models and keep that in ``timing.json``, unless it is there.

    ``on_timing`` is told the number of passes and the tokens of each.
    """
    static = [
        run for run in runs if len(run.model.exit_layers) == 1 and run.model.kv_source_layer is None
    ]
    if not static or _kept(out):
        return
    depths = {run.model.num_hidden_layers for run in static}
    tokens = PASS_BATCHES * BATCH * static[0].training.seq_len
    on_timing(ROUNDS * len(depths), tokens)
    seconds = time_static(static, tokens, threads)
    times = tuple(
        StaticTime(layers=depth, seconds_pct=100.0 * took / seconds[max(seconds)])
        for depth, took in seconds.items()
    )
    write_study(out / TIMES, StudyTimes(seconds={}, static=times, routed=()))


def time_static(runs: Sequence[StudyRun], tokens: int, threads: int) -> dict[int, float]:
    """Median seconds of a pass by depth, shallow first; every round times each depth once.

    The parameters are random: the time does not depend on them.
    """
    configs = {run.model.num_hidden_layers: run.model for run in runs}
    first = runs[0]
    vocab_size = vocabulary_size(first.tokenised()[0])
    models = {
        depth: new_model(replace(configs[depth], vocab_size=vocab_size), seed=0).eval()
        for depth in sorted(configs)
    }
    ids = torch.randint(vocab_size, (tokens + 1,), generator=torch.Generator().manual_seed(0))
    took: dict[int, list[float]] = {depth: [] for depth in models}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(ROUNDS):
            for depth, model in models.items():
                windows = batches(ids, seq_len=first.training.seq_len, batch_size=BATCH)
                took[depth].append(full_pass_seconds(model, windows))
    finally:
        torch.set_num_threads(before)
    return {depth: median(seconds) for depth, seconds in took.items()}


def timings(runs: Sequence[StudyRun], folder: Path, out: Path) -> StudyTimes:
    """Seconds of all runs, and PPL against the time of a pass.

    ``seconds_pct`` of a recipe is in percent of a full pass in the same process, the median over
    the seeds; of a static model it is in percent of the standard model's, as ``timing.json`` in
    ``out`` keeps it: where there is none, ``static`` is empty. Routed passes are those under
    ``propagate``, where a token that left costs keys, values and attention, but no MLP; under
    ``recompute`` only a decoder saves time, so a pass shows nothing. Models whose exits are
    complete take no such passes and have no times.
    """
    done = [Done(run=run, folder=folder / run.name) for run in runs]
    parts = ("train", "specialise", "evaluate")
    return StudyTimes(
        seconds={
            part: sum(entry.timing.seconds.get(part, 0.0) for entry in done) for part in parts
        },
        static=tuple(_static([entry for entry in done if entry.is_static], _kept(out))),
        routed=tuple(_routed([entry for entry in done if not entry.is_static])),
    )


def _kept(out: Path) -> Mapping[int, float]:
    """By depth, seconds of a pass in percent of the standard model's; empty where none is kept."""
    if not (out / TIMES).exists():
        return {}
    return {entry.layers: entry.seconds_pct for entry in read_times(out / TIMES).static}


def _static(done: Sequence[Done], seconds_pct: Mapping[int, float]) -> Iterator[StaticTime]:
    for depth, percent in seconds_pct.items():
        ppl = [
            entry.record.exit_ppl[depth]
            for entry in done
            if entry.layers == depth and entry.source is None
        ]
        yield StaticTime(layers=depth, seconds_pct=percent, ppl=float(np.mean(ppl)))


def _routed(done: Sequence[Done]) -> Iterator[RoutedTimes]:
    for label in dict.fromkeys(entry.run.label for entry in done):
        here = [entry for entry in done if entry.run.label == label]
        if "propagate" not in here[0].run.conventions:
            continue
        for confidence in here[0].run.measures:
            points = [_points(entry, confidence) for entry in here]
            yield RoutedTimes(
                label=label,
                confidence=confidence,
                points=tuple(
                    TimedPolicy(
                        seconds_pct=median(of[place][0] for of in points),
                        ppl=float(np.mean([of[place][1] for of in points])),
                    )
                    for place in range(len(points[0]))  # at equal shares of held-out tokens
                ),
            )


def _points(entry: Done, confidence: str) -> list[tuple[float, float]]:
    """(seconds in percent of a full pass, PPL) of each policy that took a pass."""
    passes = entry.timing.passes[confidence]
    key = FrontierKey(text="test", confidence=confidence, missing_kv="propagate")
    _, nll = entry.frontiers[key].curve()
    return [
        (100.0 * seconds / entry.timing.full_pass, float(np.exp(loss)))
        for seconds, loss in zip(passes, nll[1:-1], strict=True)
    ]
