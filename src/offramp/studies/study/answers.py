"""What a study found, in words: each sentence says how certain it is."""

from collections.abc import Iterable, Sequence

import numpy as np

from offramp.report.study_result import Row, Spread, StudyResult, TestedRatio
from offramp.report.text import p_phrase
from offramp.studies.statistics import SIGNIFICANT, Seeds, holm, paired_test
from offramp.studies.study.findings import CONFIDENCE, seed_findings
from offramp.studies.study.plan import Study
from offramp.studies.study.shared import shared_answers

BESIDE = (50.0, 80.0)
"""flops_pct at which the lowest PPL is reported, beside the one that the study compares at."""

Entry = tuple[str, float, float | None]
"""(label, ratio of PPLs, p)."""


def answers(study: Study, result: StudyResult) -> list[str]:
    """Sentences on the last layer, on the study's baseline, and on equal cost."""
    said, compared_at = [], result.compared_at
    for confidence in study.measures:
        rows = result.family(confidence, result.families[0][1])
        by = confidence + (" and the cache that decodes" if study.decoding else "")
        tested = [row for row in rows if row.label not in study.shown_only]
        points = [compared_at]
        if confidence == study.measures[0]:
            said.append(_last_layer(tested, result.train_tokens))
            if study.varies:
                said.append(_trend(rows, study, compared_at))
            if study.baseline:
                said += _against_baseline(tested, study.baseline, compared_at)
            said += shared_answers(result, tested)
            if len(tested) > 1:
                points = sorted({*BESIDE, compared_at})
        said += [_lowest(tested, by, point) for point in points]
        if len(study.recipes) == 1:
            said += [_point_by_point(row) for row in result.rows if row.confidence == confidence]
        if study.seed_findings and confidence == CONFIDENCE:
            said += seed_findings(rows, compared_at)
    return said


def _last_layer(rows: Sequence[Row], tokens: int) -> str:
    question = (
        "Does training exits help the last layer? Compared with the standard model after the same "
        f"{tokens:,} training tokens, the last layer's PPL is"
    )
    if len(rows) == 1:
        ratio = rows[0].final_to_standard
        return f"{question} {_change(ratio.mean)} ({p_phrase(ratio.p_holm)})."
    return f"{question} {_grouped(_entries((row.label, row.final_to_standard) for row in rows))}."


def _trend(rows: Sequence[Row], study: Study, compared_at: float) -> str:
    """The slope over the recipes' levels: one test of all recipes."""
    level = {recipe.label: recipe.level for recipe in study.recipes}
    graded = [(at, row) for row in rows if (at := level[row.label]) is not None]
    x = np.asarray([at for at, _ in graded], dtype=np.float64)

    def by_tenth(ppls: Sequence[Spread]) -> str:
        y = np.log(np.asarray([ppl.values for ppl in ppls], dtype=np.float64))
        slopes = np.polyfit(x, y, 1)[0] if np.isfinite(y).all() else np.full(y.shape[1], np.nan)
        if np.isnan(slopes).any():
            return "by an unknown amount"
        return f"{_change(float(np.exp(0.1 * slopes.mean())))} ({p_phrase(paired_test(slopes))})"

    final = by_tenth([row.final_ppl for _, row in graded])
    shallow = by_tenth([row.exit_ppl[min(row.exit_ppl)] for _, row in graded])
    routed = by_tenth([row.ppl_at[compared_at] for _, row in graded])
    return (
        f"Between {x.min():g} and {x.max():g}, raising {study.varies} by 0.1 makes the last "
        f"layer's PPL {final}, the exit's PPL {shallow}, and the routed PPL at {compared_at:g}% of "
        f"FLOPs, with confidence {rows[0].confidence}, {routed}. These are slopes of lines fitted "
        "to the log PPL of each seed."
    )


def _against_baseline(rows: Sequence[Row], baseline: str, compared_at: float) -> list[str]:
    """Of the last layer, and routed; where a recipe's exits cost too much, at a higher cost."""
    others = [row for row in rows if row.label != baseline]
    own = next(row for row in rows if row.label == baseline)
    finals = _grouped(_entries((row.label, row.final_to_baseline) for row in others))
    said = [f"Compared with {baseline}, the last layer's PPL is {finals}."]
    points = [compared_at]
    if any(row.to_baseline is None or row.to_baseline.mean is None for row in others):
        points.append(max(BESIDE))
    for point in points:
        if entries := _against(own, others, point):
            said.append(
                f"Compared with {baseline} at {point:g}% of FLOPs, with confidence "
                f"{own.confidence}, the routed PPL is {_grouped(entries)}."
            )
    return said


def _lowest(rows: Sequence[Row], confidence: str, point: float) -> str:
    known = [row for row in rows if row.ppl_at[point].mean is not None]
    if not known:
        return f"At {point:g}% of FLOPs no recipe has a policy with confidence {confidence}."
    statics = [row.ratio_to_static_at[point] for row in known]
    if all(static.mean is None for static in statics):
        return f"At {point:g}% of FLOPs there is no static model to compare with."
    p_values = holm([static.p_value for static in statics])
    best = min(range(len(known)), key=lambda place: _number(known[place].ppl_at[point].mean))
    own = known[best]
    ppl = f"{_number(own.ppl_at[point].mean):.3f}"
    what = f"the PPL is {ppl}" if len(rows) == 1 else f"{own.label} has the lowest PPL, {ppl}"
    said = (
        f"At {point:g}% of FLOPs, with confidence {confidence}, {what}: "
        f"{_change(statics[best].mean)} than a static model of equal cost "
        f"({p_phrase(p_values[best])}) and {_change(own.ratio_to_standard_at[point].mean)} than "
        "the standard model at full cost."
    )
    others = [row for row in known if row is not own]
    if others:
        said += (
            " (Selected as the best of several, so slightly optimistic.) Compared with it, the "
            f"PPL is {_grouped(_against(own, others, point))}."
        )
    return said


def _point_by_point(row: Row) -> str:
    """At each share of FLOPs, against static models and against the standard one at 100%."""
    said = []
    for point, static in row.ratio_to_static_at.items():
        standard = row.ratio_to_standard_at[point]
        if static.mean is None or standard.mean is None:
            continue
        said.append(
            f"at {point:g}% of FLOPs {_change(static.mean)} than static models of equal cost "
            f"({p_phrase(static.p_value)}) and {_change(standard.mean)} than the standard model "
            f"at 100% ({p_phrase(standard.p_value)})"
        )
    return (
        f'{row.label} with confidence {row.confidence} and missing_kv = "{row.missing_kv}": '
        f"the PPL is {'; '.join(said)}. These p-values are not corrected for multiple tests."
    )


def _entries(ratios: Iterable[tuple[str, TestedRatio | None]]) -> list[Entry]:
    return [
        (label, _number(ratio.mean), ratio.p_holm) for label, ratio in ratios if ratio is not None
    ]


def _against(own: Row, others: Sequence[Row], point: float) -> list[Entry]:
    """Ratios of the others' PPLs to ``own``'s at equal cost, those without a PPL there left out.

    Paired by seed, with Holm's correction over the others.
    """
    labels, differences = [], []
    for row in others:
        difference = _log(row, point) - _log(own, point)
        if np.isfinite(difference).all():
            labels.append(row.label)
            differences.append(difference)
    p_values = holm([paired_test(difference) for difference in differences])
    ratios = [float(np.exp(difference.mean())) for difference in differences]
    return list(zip(labels, ratios, p_values, strict=True))


def _log(row: Row, point: float) -> Seeds:
    """Log PPL by seed, minus that of the standard model."""
    values = row.ratio_to_standard_at[point].values
    return np.log([np.nan if value is None else value for value in values])


def _grouped(entries: Sequence[Entry]) -> str:
    """The entries as: lower with A (-2.0%, p = 0.010); undecided with B (...)."""
    groups: dict[str, list[str]] = {"lower": [], "higher": [], "undecided": []}
    for label, ratio, p_value in entries:
        significant = p_value is not None and p_value < SIGNIFICANT
        group = "undecided" if not significant else "lower" if ratio < 1 else "higher"
        groups[group].append(f"{label} ({100 * (ratio - 1):+.1f}%, {p_phrase(p_value)})")
    return "; ".join(f"{name} with {', '.join(of)}" for name, of in groups.items() if of)


def _change(ratio: float | None) -> str:
    change = 100 * (_number(ratio) - 1)
    return f"{abs(change):.1f}% {'higher' if change > 0 else 'lower'}"


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
