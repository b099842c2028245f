"""What a study's runs took on the clock; apart from study.json, which is the same every time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from offramp.experiments.study.comparison import Done
from offramp.experiments.study.run import StudyRun


def timings(runs: Sequence[StudyRun], folder: Path) -> dict[str, Any]:
    """Seconds of all runs, and PPL against the measured time of a pass, medians over the seeds.

    ``seconds_pct`` is in percent of a full pass: for a routed model of its own in the same
    process, for a static one of the standard model's of the same seed, which may have run beside
    other work. Routed passes are those under ``propagate``, where who left costs keys, values
    and attention, but no MLP; under ``recompute`` only a decoder saves time, so there is nothing
    to measure in a pass.
    """
    done = [Done(run=run, folder=folder / run.name) for run in runs]
    seconds = [entry.timing["seconds"] for entry in done]
    return {
        "seconds": {
            part: sum(entry.get(part, 0.0) for entry in seconds)
            for part in ("train", "specialise", "evaluate")
        },
        "static": list(_static([entry for entry in done if len(entry.run.model.exit_layers) == 1])),
        "routed": list(_routed([entry for entry in done if len(entry.run.model.exit_layers) > 1])),
    }


def _static(done: Sequence[Done]) -> Iterator[dict[str, Any]]:
    depths = sorted({entry.run.model.num_hidden_layers for entry in done})
    full = {
        entry.seed: entry.timing["passes"]["full"][0]
        for entry in done
        if entry.run.model.num_hidden_layers == depths[-1]
    }
    for depth in depths:
        here = [entry for entry in done if entry.run.model.num_hidden_layers == depth]
        shares = [100.0 * entry.timing["passes"]["full"][0] / full[entry.seed] for entry in here]
        yield {
            "layers": depth,
            "seconds_pct": median(shares),
            "ppl": float(np.mean([entry.exit_ppl[depth] for entry in here])),
        }


def _routed(done: Sequence[Done]) -> Iterator[dict[str, Any]]:
    for label in dict.fromkeys(entry.run.label for entry in done):
        here = [entry for entry in done if entry.run.label == label]
        for confidence in here[0].run.measures:
            points = [_points(entry, confidence) for entry in here]
            policies = min(map(len, points))  # equal thresholds are one policy
            yield {
                "label": label,
                "confidence": confidence,
                "points": [
                    {
                        "seconds_pct": median(of[place][0] for of in points),
                        "ppl": float(np.mean([of[place][1] for of in points])),
                    }
                    for place in range(policies)
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
