"""A study's runs -> study.json: array work on their frontiers.

Everything is compared at equal flops_pct of the standard model, with exit heads and gates
counted, and with static models: shallower ones trained on the same tokens. Intervals are
percentiles of a bootstrap over seeds and over stretches of the test text, all seeds' alike.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from offramp.studies.statistics import holm
from offramp.studies.study.comparison import AREA, CONVENTIONS, Comparison, Done
from offramp.studies.study.plan import Study
from offramp.studies.study.run import StudyRun

_RATIOS = ("to_static", "area", "final_to_standard")
"""What is tested of each row, with Holm's correction over the recipes."""
_TO_BASELINE = ("to_baseline", "final_to_baseline")
"""The same of each row but the baseline's own."""


def summarise(study: Study, runs: Sequence[StudyRun], folder: Path) -> dict[str, Any]:
    """The runs' figures, the static models', and a row of comparisons for each recipe."""
    check_equal_tokens(runs)
    done = [Done(run=run, folder=folder / run.name) for run in runs]
    check_equal_text(done)
    static = [entry for entry in done if len(entry.run.model.exit_layers) == 1]
    routed = [entry for entry in done if len(entry.run.model.exit_layers) > 1]
    seeds = sorted({entry.seed for entry in done})
    comparison = Comparison(
        static=static,
        seeds=seeds,
        depth=study.model.num_hidden_layers,
        compared_at=study.compared_at,
    )
    labels = list(dict.fromkeys(entry.run.label for entry in routed))
    of_label = {label: [entry for entry in routed if entry.run.label == label] for label in labels}
    rows = [
        comparison.row(of_label[label], confidence, kv, of_label.get(study.baseline or ""))
        for label in labels
        for confidence in study.measures
        for kv in CONVENTIONS
    ]
    _correct(rows, study)
    content = {
        "train_tokens": runs[0].tokens,
        "test_tokens": done[0].about["test_tokens"],
        "seeds": seeds,
        "compared_at": study.compared_at,
        "area": [float(AREA[0]), float(AREA[-1])],
        "static": [comparison.static_entry(entry) for entry in static],
        "runs": [comparison.routed_entry(entry) for entry in routed],
        "summary": rows,
    }
    return cast("dict[str, Any]", _without_nan(content))


def _correct(rows: Sequence[dict[str, Any]], study: Study) -> None:
    """Holm's correction; rows by one measure and one meaning of the missing cache are a family."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault((row["confidence"], row["missing_kv"]), []).append(row)
    for family in families.values():
        for ratio in (*_RATIOS, *(_TO_BASELINE if study.baseline else ())):
            untested = study.shown_only | ({study.baseline} if ratio in _TO_BASELINE else set())
            corrected = holm(
                [None if row["label"] in untested else row[ratio]["p_value"] for row in family]
            )
            for row, p_value in zip(family, corrected, strict=True):
                row[ratio]["p_holm"] = p_value
        for row in family:
            row["p_value"] = row["to_static"]["p_holm"]


def _without_nan(content: Any) -> Any:
    """JSON has no NaN: what is not known, such as a PPL beyond a frontier's ends, is null."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def check_equal_tokens(runs: Sequence[StudyRun]) -> None:
    """No summary compares runs that saw different numbers of tokens."""
    budgets = sorted({(run.tokens, run.test_tokens) for run in runs})
    if len(budgets) != 1:
        raise ValueError(f"runs: expected one budget of training and test tokens, got {budgets}")


def check_equal_text(done: Sequence[Done]) -> None:
    """What is paired must be the same text."""
    found = {
        (entry.about["test_tokens"], entry.about["config"]["text"]["test_sha256"]) for entry in done
    }
    if len(found) != 1:
        raise ValueError(f"runs: expected one test text, got {sorted(found)}")
