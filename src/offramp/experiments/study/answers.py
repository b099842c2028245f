"""What a study found, in words: each sentence says how surely."""

from collections.abc import Mapping, Sequence
from typing import Any

from offramp.experiments.statistics import SIGNIFICANT
from offramp.experiments.study.findings import CONFIDENCE, seed_findings
from offramp.experiments.study.plan import Study
from offramp.report.text import p_phrase

Row = Mapping[str, Any]


def answers(study: Study, content: Mapping[str, Any]) -> list[str]:
    """Sentences on the last layer, on equal cost, and on the study's baseline."""
    said = []
    for confidence in study.measures:
        rows = [
            row
            for row in content["summary"]
            if _is(row, confidence) and row["missing_kv"] == "recompute"
        ]
        if confidence == study.measures[0]:
            said.append(_last_layer(rows))
            if study.baseline:
                said += _against_baseline(rows, study.baseline)
        said.append(_equal_cost(rows, confidence, content["compared_at"]))
        if len(study.recipes) == 1:
            said += [_point_by_point(row) for row in content["summary"] if _is(row, confidence)]
        if study.seed_findings and confidence == CONFIDENCE:
            said += seed_findings(rows, content["compared_at"])
    return said


def _is(row: Row, confidence: str) -> bool:
    return bool(row["confidence"] == confidence)


def _last_layer(rows: Sequence[Row]) -> str:
    better = _significant(rows, "final_to_standard", below=True)
    worse = _significant(rows, "final_to_standard", below=False)
    return (
        "Does training exits help the last layer? Against the standard model on the same tokens "
        f"it is better with {_list(better)} and worse with {_list(worse)} of {len(rows)} recipes "
        f"(p < {SIGNIFICANT}); the others are undecided."
    )


def _equal_cost(rows: Sequence[Row], confidence: str, compared_at: float) -> str:
    point = f"{compared_at:g}"
    if all(row["ppl_at"][point]["mean"] is None for row in rows):
        return f"At {point}% of FLOPs no recipe has a policy by {confidence}."
    known = [row for row in rows if row["to_static"]["mean"] is not None]
    if not known:
        return f"At {point}% of FLOPs there is no static model to compare with."
    best = min(known, key=lambda row: float(row["ppl_at"][f"{compared_at:g}"]["mean"]))
    static, standard = best["to_static"], best["ratio_to_standard_at"][f"{compared_at:g}"]
    return (
        f"At {compared_at:g}% of FLOPs, leaving by {confidence}, the lowest PPL is that of "
        f"{best['label']}: {_percent(static['mean'])} against a static model of equal cost "
        f"({p_phrase(static['p_holm'])}) and {_percent(standard['mean'])} against the standard "
        "model at full cost."
        + (" (The best of several, so a little flattered.)" if len(known) > 1 else "")
    )


def _point_by_point(row: Row) -> str:
    """At each share of FLOPs, against static models and against the standard one at 100%."""
    said = []
    for point, static in row["ratio_to_static_at"].items():
        standard = row["ratio_to_standard_at"][point]
        if static["mean"] is None or standard["mean"] is None:
            continue
        said.append(
            f"at {point}% of FLOPs {_percent(static['mean'])} than static models of equal cost "
            f"({p_phrase(static['p_value'])}) and {_percent(standard['mean'])} than the standard "
            f"model at 100% ({p_phrase(standard['p_value'])})"
        )
    return (
        f'{row["label"]} by {row["confidence"]}, missing_kv = "{row["missing_kv"]}": '
        f"PPL {'; '.join(said)}. These p are not corrected for their number."
    )


def _against_baseline(rows: Sequence[Row], baseline: str) -> list[str]:
    said = []
    for row in rows:
        if row["label"] == baseline:
            continue
        final, routed = row["final_to_baseline"], row["to_baseline"]
        routing = (
            "not comparable at equal cost"
            if routed["mean"] is None
            else f"{_percent(routed['mean'])} at equal cost ({p_phrase(routed['p_holm'])})"
        )
        said.append(
            f"{row['label']} against {baseline}: the last layer's PPL is {_percent(final['mean'])} "
            f"({p_phrase(final['p_holm'])}), the routed PPL {routing}."
        )
    return said


def _significant(rows: Sequence[Row], ratio: str, *, below: bool) -> list[str]:
    return [
        str(row["label"])
        for row in rows
        if row[ratio]["p_holm"] is not None
        and row[ratio]["p_holm"] < SIGNIFICANT
        and (row[ratio]["mean"] < 1) == below
    ]


def _list(labels: Sequence[str]) -> str:
    return ", ".join(labels) if labels else "none"


def _percent(ratio: float | str) -> str:
    change = 100 * (float(ratio) - 1)
    return f"{abs(change):.1f}% {'higher' if change > 0 else 'lower'}"
