"""What a study found, in words: each sentence says how surely."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offramp.report.text import p_phrase
from offramp.studies.statistics import SIGNIFICANT, Seeds, holm, paired_test
from offramp.studies.study.findings import CONFIDENCE, seed_findings
from offramp.studies.study.plan import Study

BESIDE = (50.0, 80.0)
"""flops_pct at which the lowest PPL is named, too, beside the one that the study compares at."""

Row = Mapping[str, Any]


def answers(study: Study, content: Mapping[str, Any]) -> list[str]:
    """Sentences on the last layer, on the study's baseline, and on equal cost."""
    said, compared_at = [], float(content["compared_at"])
    for confidence in study.measures:
        rows = [
            row
            for row in content["summary"]
            if _is(row, confidence) and row["missing_kv"] == "recompute"
        ]
        tested = [row for row in rows if row["label"] not in study.shown_only]
        points = [compared_at]
        if confidence == study.measures[0]:
            said.append(_last_layer(tested, content["train_tokens"]))
            if study.varies:
                said.append(_trend(rows, study, compared_at))
            if study.baseline:
                said += _against_baseline(tested, study.baseline, compared_at)
            if len(tested) > 1:
                points = sorted({*BESIDE, compared_at})
        said += [_lowest(tested, confidence, point) for point in points]
        if len(study.recipes) == 1:
            said += [_point_by_point(row) for row in content["summary"] if _is(row, confidence)]
        if study.seed_findings and confidence == CONFIDENCE:
            said += seed_findings(rows, compared_at)
    return said


def _is(row: Row, confidence: str) -> bool:
    return bool(row["confidence"] == confidence)


def _last_layer(rows: Sequence[Row], tokens: int) -> str:
    asked = f"Does training exits help the last layer? After {tokens:,} training tokens"
    if len(rows) == 1:
        ratio = rows[0]["final_to_standard"]
        return (
            f"{asked} its PPL is {_change(ratio['mean'])} than the standard model's on the same "
            f"tokens ({p_phrase(ratio['p_holm'])})."
        )
    return (
        f"{asked}, against the standard model on the same tokens, its PPL is "
        f"{_sorted_out(_entries(rows, 'final_to_standard'))}."
    )


def _trend(rows: Sequence[Row], study: Study, compared_at: float) -> str:
    """A line through the log PPL of each seed: one test of all recipes."""
    level = {recipe.label: recipe.level for recipe in study.recipes}
    graded = [(level[row["label"]], row) for row in rows if level[row["label"]] is not None]
    x = np.asarray([at for at, _ in graded], dtype=np.float64)

    def by_tenth(ppls: Sequence[Row]) -> str:
        y = np.log(np.asarray([ppl["values"] for ppl in ppls], dtype=np.float64))
        slopes = np.polyfit(x, y, 1)[0] if np.isfinite(y).all() else np.full(y.shape[1], np.nan)
        if np.isnan(slopes).any():
            return "not known"
        change = _change(float(np.exp(0.1 * slopes.mean())))
        return f"{change} ({p_phrase(paired_test(slopes))})"

    final = [row["final_ppl"] for _, row in graded]
    shallow = [row["exit_ppl"][min(row["exit_ppl"], key=int)] for _, row in graded]
    routed = [row["ppl_at"][f"{compared_at:g}"] for _, row in graded]
    return (
        f"From {x.min():g} to {x.max():g} of {study.varies}, each 0.1 more makes the last layer's "
        f"PPL {by_tenth(final)}, the exit's {by_tenth(shallow)}, and the routed one at "
        f"{compared_at:g}% of FLOPs, leaving by {rows[0]['confidence']}, {by_tenth(routed)}; "
        "a line through the log PPL of each seed."
    )


def _against_baseline(rows: Sequence[Row], baseline: str, compared_at: float) -> list[str]:
    """Of the last layer, and routed; where a recipe's exits cost too much, at a higher cost."""
    others = [row for row in rows if row["label"] != baseline]
    own = next(row for row in rows if row["label"] == baseline)
    finals = _sorted_out(_entries(others, "final_to_baseline"))
    said = [f"Against {baseline}, the last layer's PPL is {finals}."]
    points = [compared_at]
    if any(row["to_baseline"]["mean"] is None for row in others):
        points.append(max(BESIDE))
    for point in points:
        if entries := _against(own, others, point):
            said.append(
                f"Against {baseline} at {point:g}% of FLOPs, leaving by {own['confidence']}, the "
                f"routed PPL is {_sorted_out(entries)}."
            )
    return said


def _lowest(rows: Sequence[Row], confidence: str, compared_at: float) -> str:
    point = f"{compared_at:g}"
    place = f"At {point}% of FLOPs, leaving by {confidence}"
    known = [row for row in rows if row["ppl_at"][point]["mean"] is not None]
    if not known:
        return f"At {point}% of FLOPs no recipe has a policy by {confidence}."
    statics = [row["ratio_to_static_at"][point] for row in known]
    if all(static["mean"] is None for static in statics):
        return f"At {point}% of FLOPs there is no static model to compare with."
    p_values = holm([static["p_value"] for static in statics])
    best = min(range(len(known)), key=lambda at: float(known[at]["ppl_at"][point]["mean"]))
    ppl, standard = (known[best][of][point] for of in ("ppl_at", "ratio_to_standard_at"))
    whose = "the PPL is" if len(rows) == 1 else f"the lowest PPL is that of {known[best]['label']},"
    said = (
        f"{place}, {whose} {float(ppl['mean']):.3f}: {_change(statics[best]['mean'])} than that of "
        f"a static model of equal cost ({p_phrase(p_values[best])}) and "
        f"{_change(standard['mean'])} than the standard model's at full cost."
    )
    others = [row for row in known if row is not known[best]]
    if others:
        said += (
            " (The best of several, so a little flattered.) Against it the PPL is "
            f"{_sorted_out(_against(known[best], others, compared_at))}."
        )
    return said


def _point_by_point(row: Row) -> str:
    """At each share of FLOPs, against static models and against the standard one at 100%."""
    said = []
    for point, static in row["ratio_to_static_at"].items():
        standard = row["ratio_to_standard_at"][point]
        if static["mean"] is None or standard["mean"] is None:
            continue
        said.append(
            f"at {point}% of FLOPs {_change(static['mean'])} than static models of equal cost "
            f"({p_phrase(static['p_value'])}) and {_change(standard['mean'])} than the standard "
            f"model at 100% ({p_phrase(standard['p_value'])})"
        )
    return (
        f'{row["label"]} by {row["confidence"]}, missing_kv = "{row["missing_kv"]}": '
        f"PPL {'; '.join(said)}. These p are not corrected for their number."
    )


def _entries(rows: Sequence[Row], ratio: str) -> list[tuple[str, float, float | None]]:
    return [(row["label"], row[ratio]["mean"], row[ratio]["p_holm"]) for row in rows]


def _against(
    own: Row, others: Sequence[Row], compared_at: float
) -> list[tuple[str, float, float | None]]:
    """(label, ratio of its PPL to ``own``'s at equal cost, p); those without a PPL there left out.

    Paired by seed, Holm's correction over the others.
    """
    labels, differences = [], []
    for row in others:
        difference = _log(row, compared_at) - _log(own, compared_at)
        if np.isfinite(difference).all():
            labels.append(str(row["label"]))
            differences.append(difference)
    p_values = holm([paired_test(difference) for difference in differences])
    ratios = [float(np.exp(difference.mean())) for difference in differences]
    return list(zip(labels, ratios, p_values, strict=True))


def _log(row: Row, compared_at: float) -> Seeds:
    """Log PPL by seed, less that of the standard model."""
    values = row["ratio_to_standard_at"][f"{compared_at:g}"]["values"]
    return np.log([np.nan if value is None else float(value) for value in values])


def _sorted_out(entries: Sequence[tuple[str, float, float | None]]) -> str:
    """(label, ratio, p) as: lower with A (-2.0%, p = 0.010); undecided with B (...)."""
    groups: dict[str, list[str]] = {"lower": [], "higher": [], "undecided": []}
    for label, ratio, p_value in entries:
        surely = p_value is not None and p_value < SIGNIFICANT
        group = "undecided" if not surely else "lower" if ratio < 1 else "higher"
        groups[group].append(f"{label} ({100 * (ratio - 1):+.1f}%, {p_phrase(p_value)})")
    return "; ".join(f"{name} with {', '.join(of)}" for name, of in groups.items() if of)


def _change(ratio: float | str) -> str:
    change = 100 * (float(ratio) - 1)
    return f"{abs(change):.1f}% {'higher' if change > 0 else 'lower'}"
