"""The three conclusions with which a study's page begins; the answers say more, with p-values."""

from collections.abc import Iterable, Sequence

from offramp.report.study_result import Ratio, Row, StudyResult, TestedRatio

SIGNIFICANT = 0.05


def conclusions(result: StudyResult) -> list[str]:
    """Return what was found at the cost that the study compares at, of the last layer, and of all.

    They are about the study's first measure and meaning of ``missing_kv``.
    """
    confidence, missing_kv = result.families[0]
    rows = result.family(confidence, missing_kv)
    known = [row for row in rows if row.ppl_at[result.compared_at].mean is not None]
    said = [_best(result, known), _all(known)] if known else [_nothing(result)]
    return [sentence for sentence in (*said, _last_layer(rows)) if sentence]


def _best(result: StudyResult, rows: Sequence[Row]) -> str:
    at = result.compared_at
    best = min(rows, key=lambda row: row.ppl_at[at].mean or 0.0)
    ppl = best.ppl_at[at].mean or 0.0
    begin = (
        f"At {at:g}% of FLOPs the PPL is {ppl:.3f}"
        if len(rows) == 1
        else f"At {at:g}% of FLOPs {best.label} has the lowest PPL, {ppl:.3f}"
    )
    parts = []
    if best.to_static.mean is not None:
        parts.append(
            f"{_change(best.to_static)} than that of static models of equal cost "
            f"({_certainty(best.to_static, result)})"
        )
    if best.ratio_to_standard_at[at].mean is not None:
        standard = _change(best.ratio_to_standard_at[at])
        parts.append(f"{standard} than that of the standard model at full cost")
    return f"{begin}{': ' if parts else ''}{' and '.join(parts)}."


def _all(rows: Sequence[Row]) -> str:
    """How many recipes are better or worse than static models, and than the baseline."""
    if len(rows) == 1:
        return ""
    said = [f"Compared with static models of equal cost, {_counted(row.to_static for row in rows)}"]
    tested = [row.to_baseline for row in rows if row.to_baseline is not None]
    if any(ratio.p_holm is not None for ratio in tested):
        said.append(f"compared with the study's baseline, {_counted(tested)}")
    return f"{'; '.join(said)}."


def _last_layer(rows: Sequence[Row]) -> str:
    ratios = [row.final_to_standard for row in rows if row.final_to_standard.mean is not None]
    ratios = [ratio for ratio in ratios if ratio.p_holm is not None] or ratios
    if not ratios:
        return ""
    changes = sorted(100 * ((ratio.mean or 1.0) - 1) for ratio in ratios)
    low, high = changes[0], changes[-1]
    if low >= 0 or high <= 0:
        ends = sorted((abs(low), abs(high)))
        span = " to ".join(dict.fromkeys(f"{end:.1f}" for end in ends))
        differs = f"is {span}% {'higher' if low >= 0 else 'lower'} than"
    else:
        differs = f"differs by {low:+.1f} to {high:+.1f}% from"
    counted = f"; {_counted(ratios)}" if len(ratios) > 1 else ""
    return (
        f"The last layer's PPL {differs} that of the standard model, which has no exits{counted}."
    )


def _nothing(result: StudyResult) -> str:
    return f"At {result.compared_at:g}% of FLOPs no recipe has a policy."


def _counted(ratios: Iterable[TestedRatio | None]) -> str:
    """How many of the ratios of which a claim is made are better, worse and undecided."""
    counts = {"better": 0, "worse": 0, "undecided": 0}
    for ratio in ratios:
        if ratio is None or ratio.mean is None or ratio.p_holm is None:
            continue
        decided = ratio.p_holm < SIGNIFICANT
        counts["undecided" if not decided else "better" if ratio.mean < 1 else "worse"] += 1
    found = {name: count for name, count in counts.items() if count}
    total = sum(found.values())
    if len(found) == 1:
        return f"all {total} recipes are {next(iter(found))}"
    if not found:
        return "no recipe is tested"
    said = [f"{count} {'is' if count == 1 else 'are'} {each}" for each, count in found.items()]
    return f"of {total} recipes {', '.join(said)}"


def _certainty(ratio: TestedRatio, result: StudyResult) -> str:
    if ratio.p_holm is not None and ratio.p_holm < SIGNIFICANT:
        return "decided"
    count = len(result.seeds)
    return f"undecided with {count} {'seed' if count == 1 else 'seeds'}"


def _change(ratio: Ratio) -> str:
    change = 100 * ((ratio.mean or 1.0) - 1)
    return f"{abs(change):.1f}% {'higher' if change > 0 else 'lower'}"
