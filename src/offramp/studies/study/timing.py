"""What a study's runs took on the clock; apart from study.json, which is the same every time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from offramp.data import batches
from offramp.studies.study.comparison import Done
from offramp.studies.study.evaluate import BATCH, full_pass_seconds
from offramp.studies.study.run import StudyRun
from offramp.training.loop import new_model

PASS_BATCHES, ROUNDS = 8, 3
"""Of the passes that static models are timed by."""


def timings(runs: Sequence[StudyRun], folder: Path, *, threads: int) -> dict[str, Any]:
    """Seconds of all runs, and PPL against the time of a pass.

    ``seconds_pct`` is in percent of a full pass: for a routed model of its own in the same
    process, median over the seeds; for a static one of the standard model's, timed side by side
    here and now, since the runs may have had different company. Routed passes are those under
    ``propagate``, where who left costs keys, values and attention, but no MLP; under
    ``recompute`` only a decoder saves time, so there is nothing to measure in a pass.
    """
    done = [Done(run=run, folder=folder / run.name) for run in runs]
    seconds = [entry.timing["seconds"] for entry in done]
    static = [entry for entry in done if len(entry.run.model.exit_layers) == 1]
    routed = [entry for entry in done if len(entry.run.model.exit_layers) > 1]
    return {
        "seconds": {
            part: sum(entry.get(part, 0.0) for entry in seconds)
            for part in ("train", "specialise", "evaluate")
        },
        "static": list(_static(static, _time_static(static, threads))),
        "routed": list(_routed(routed)),
    }


def _time_static(done: Sequence[Done], threads: int) -> dict[int, float]:
    """Median seconds of a pass by depth, in turns; what the parameters are makes no difference."""
    configs = {entry.run.model.num_hidden_layers: entry.run.model for entry in done}
    first = done[0].run
    vocab_size = first.tokenised()[0].get_vocab_size()
    models = {
        depth: new_model(replace(configs[depth], vocab_size=vocab_size), seed=0)
        for depth in sorted(configs)
    }
    shape = (PASS_BATCHES * BATCH * first.training.seq_len + 1,)
    ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
    took: dict[int, list[float]] = {depth: [] for depth in models}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(ROUNDS):
            for depth, model in models.items():
                windows = batches(ids, seq_len=first.training.seq_len, batch_size=BATCH)
                took[depth].append(full_pass_seconds(model.eval(), windows))
    finally:
        torch.set_num_threads(before)
    return {depth: median(seconds) for depth, seconds in took.items()}


def _static(done: Sequence[Done], took: Mapping[int, float]) -> Iterator[dict[str, Any]]:
    for depth, seconds in took.items():
        here = [entry for entry in done if entry.run.model.num_hidden_layers == depth]
        yield {
            "layers": depth,
            "seconds_pct": 100.0 * seconds / took[max(took)],
            "ppl": float(np.mean([entry.exit_ppl[depth] for entry in here])),
        }


def _routed(done: Sequence[Done]) -> Iterator[dict[str, Any]]:
    for label in dict.fromkeys(entry.run.label for entry in done):
        here = [entry for entry in done if entry.run.label == label]
        for confidence in here[0].run.measures:
            points = [_points(entry, confidence) for entry in here]
            yield {
                "label": label,
                "confidence": confidence,
                "points": [
                    {
                        "seconds_pct": median(of[place][0] for of in points),
                        "ppl": float(np.mean([of[place][1] for of in points])),
                    }
                    for place in range(len(points[0]))  # at equal shares of held-out tokens
                ],
            }


def _points(entry: Done, confidence: str) -> list[tuple[float, float]]:
    """(seconds in percent of a full pass, PPL) of each policy that took a pass."""
    passes = entry.timing["passes"]
    _, nll = entry.frontiers[f"test/{confidence}/propagate"].curve()
    return [
        (100.0 * seconds / passes["full"][0], float(np.exp(loss)))
        for seconds, loss in zip(passes[confidence], nll[1:-1], strict=True)
    ]
