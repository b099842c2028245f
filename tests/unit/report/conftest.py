from statistics import fmean, stdev
from typing import Any

import pytest

ALPHA_07 = "Asymmetric | α=0.7 <b>"
ALL_LAYERS = "All layers, α=0.7"


def make_stat(*values: float) -> dict[str, Any]:
    std = stdev(values) if len(values) > 1 else None
    return {"mean": fmean(values), "std": std, "values": list(values)}


def make_row(label, weights, threshold, epoch, published, ppl, seeds) -> dict[str, Any]:
    measured = make_stat(*[ppl + 2.0 * seed for seed in range(seeds)])
    distance = None
    if published and measured["std"]:
        distance = (published["ppl"] - measured["mean"]) / measured["std"]
    routed = threshold is not None
    return {
        "label": label,
        "loss_weights": weights,
        "threshold": threshold,
        "epoch": epoch,
        "missing_kv": "recompute",
        "published": published,
        "measured": {
            "ppl": measured,
            "shallow_pct": make_stat(*[60.0 * routed + seed for seed in range(seeds)]),
            "compute_pct": make_stat(*[100.0 - 40.0 * routed for _ in range(seeds)]),
        },
        "distance_in_std": distance,
    }


def make_corpus(seeds: int) -> dict[str, Any]:
    shallow, everywhere = {"1": 0.7, "3": 0.3}, {"1": 0.7, "2": 1.0, "3": 0.3}

    def published(ppl, shallow_pct, compute_pct):
        return {"ppl": ppl, "shallow_pct": shallow_pct, "compute_pct": compute_pct}

    headline, late = published(22.95, 52.4, 65.0), published(31.46, 59.7, 60.2)
    far, standard = published(54.9, 68.9, 54.0), published(34.86, None, 100.0)

    def curve(label, weights, epoch, ppl):
        points = [
            {
                "threshold": step / 4,
                "ppl": make_stat(*[ppl - step + 2.0 * seed for seed in range(seeds)]),
                "shallow_pct": make_stat(*[100.0 - 10.0 * step] * seeds),
                "compute_pct": make_stat(*[34.0 + 7.0 * step] * seeds),
            }
            for step in range(5)
        ]
        return {"label": label, "loss_weights": weights, "epoch": epoch, "points": points}

    def finding(number, verdict):
        return {
            "id": number,
            "claim": f"claim {number} <i>",
            "published": "22.95 < 32.07",
            "measured": "25.0 | 29.0",
            "effect_pct": make_stat(*[4.5 + seed for seed in range(seeds)]),
            "p_value": 0.0421,
            "p_value_uncorrected": 0.0004,
            "n_seeds": seeds,
            "verdict": verdict,
            "test": "Paired t-test of log PPL.",
        }

    verdicts = ("holds", "does not hold", *["undecided"] * 4)
    curves = [
        curve(label, weights, epoch, ppl + 8.0 * (epoch == "last"))
        for epoch in ("best", "last")
        for label, weights, ppl in ((ALPHA_07, shallow, 30.0), (ALL_LAYERS, everywhere, 32.0))
    ]
    exits = {
        "1": make_stat(*[30.0 + seed for seed in range(seeds)]),
        "2": make_stat(*[400.0 + seed for seed in range(seeds)]),
        "3": make_stat(*[24.0 + seed for seed in range(seeds)]),
    }
    return {
        "sha256": "ab" * 32,
        "protocol": {
            "train_characters": 100_000,
            "max_epochs": None,
            "seeds": list(range(seeds)),
            "threshold": 0.95,
            "split": "A sentence about the split.",
            "model": {"dim": 64, "tied": False},
        },
        "tables": {
            "exp5_results": [make_row(ALPHA_07, shallow, 0.95, "best", headline, 25.0, seeds)],
            "exp5_thresholds": [make_row(ALPHA_07, shallow, 0.95, "last", late, 30.0, seeds)],
            "exp6_results": [
                make_row("The same by another name", shallow, 0.95, "best", headline, 25.0, seeds),
                make_row(ALL_LAYERS, everywhere, 0.95, "best", None, 27.0, seeds),
            ],
            "exp6_thresholds": [make_row(ALL_LAYERS, everywhere, 0.95, "last", far, 35.0, seeds)],
            "baselines": [make_row("Standard", {"3": 1.0}, None, "best", standard, 33.0, seeds)],
        },
        "findings": [finding(number, verdict) for number, verdict in enumerate(verdicts, 1)],
        "explanations": [
            {
                "question": "Is exit 1 too sure?",
                "measured": "0.1",
                "p_value": None,
                "answer": "undecided",
            }
        ],
        "curves": curves,
        "exit_ppl": [
            {"label": ALPHA_07, "epoch": epoch, "exits": exits} for epoch in ("best", "last")
        ],
        "passages": [
            {
                "label": ALPHA_07,
                "seed": 0,
                "threshold": 0.95,
                "characters": ["<", "b", ">", " ", "\n", "&"],
                "exit_layer": [1, 1, 3, 1, 3, 3],
                "confidence": [0.99, 0.97, 0.5, 0.96, 0.25, 0.1],
            }
        ],
        "notes": ["Two epochs <stand> in one document."],
    }


def make_results(seeds: int = 3) -> dict[str, Any]:
    """Results of two corpora as ``offramp reproduce`` writes them, with awkward labels."""
    return {
        "corpora": {"pangram": make_corpus(seeds), "other <text>": make_corpus(seeds)},
        "environment": {"python": "3.11", "threads": 2},
        "offramp_version": "0.1.0",
        "seconds": 12.5,
        "command": "offramp reproduce --seeds <n>",
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture
def one_seed() -> dict[str, Any]:
    return make_results(seeds=1)


@pytest.fixture
def corpus(results: dict[str, Any]) -> dict[str, Any]:
    return results["corpora"]["pangram"]
