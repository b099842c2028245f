"""A study's figures as CSV: the summary, and every point of every frontier."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from offramp.report.study_result import Ratio, StudyResult


def summary_csv(result: StudyResult) -> str:
    """Return a line for each recipe, measure and meaning of ``missing_kv``, and each cost.

    Ratios are of PPLs, the recipe's divided by the other's; a cell that is not known is empty.
    """
    header = (
        *("recipe", "confidence", "missing_kv", "loss_weights", "flops_pct", "compute_pct"),
        *("ppl", "ppl_std", "ppl_low", "ppl_high", "to_static", "to_static_p"),
        *("to_standard", "to_standard_p", "last_layer_ppl", "last_layer_to_standard"),
    )
    rows = []
    for row in result.rows:
        for cost, ppl in row.ppl_at.items():
            low, high = ppl.interval or (None, None)
            static, standard = row.ratio_to_static_at[cost], row.ratio_to_standard_at[cost]
            rows.append(
                (
                    *(row.label, row.confidence, row.missing_kv, row.loss_weights),
                    *(cost, row.compute_pct_at[cost], ppl.mean, ppl.std, low, high),
                    *_tested(static),
                    *_tested(standard),
                    *(row.final_ppl.mean, row.final_to_standard.mean),
                )
            )
    return written(header, rows)


def frontiers_csv(result: StudyResult) -> str:
    """Return a line for each policy of each run, and one for each static model."""
    header = ("recipe", "seed", "confidence", "missing_kv", "threshold")
    rows: list[Sequence[Any]] = [
        (
            f"static {model.layers}" + ("" if model.source is None else f", source {model.source}"),
            *(model.seed, "", "", "", model.compute_pct, model.flops_pct, model.ppl),
        )
        for model in result.static
    ]
    for run in result.runs:
        for confidence, curves in run.frontiers.items():
            for missing_kv, curve in curves.items():
                points = zip(
                    curve.threshold, curve.compute_pct, curve.flops_pct, curve.ppl, strict=True
                )
                rows += [(run.label, run.seed, confidence, missing_kv, *point) for point in points]
    return written((*header, "compute_pct", "flops_pct", "ppl"), rows)


def _tested(ratio: Ratio) -> tuple[Any, Any]:
    return ratio.mean, ratio.p_value


def written(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return text.getvalue()
