"""A study's runs -> its result: array work on their frontiers.

Everything is compared at equal flops_pct of the standard model, with exit heads and gates
counted, and with static models: shallower ones trained on the same tokens. Intervals are
percentiles of a bootstrap over seeds and over stretches of the test text, with the same samples
for every model. Nothing here trains, times or runs a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from offramp.report.study_result import Row, Searched, StudyResult, TestedRatio
from offramp.studies.statistics import holm
from offramp.studies.study.answers import answers
from offramp.studies.study.comparison import Comparison
from offramp.studies.study.done import Done
from offramp.studies.study.plan import Study
from offramp.studies.study.run import StudyRun
from offramp.studies.study.static import AREA
from offramp.version import __version__

_RATIOS = ("to_static", "area", "final_to_standard")
"""Fields of a row that are tested, with Holm's correction over the recipes."""
_TO_BASELINE = ("to_baseline", "final_to_baseline")
"""Fields that are tested of every row but the baseline's own."""


def summarise(
    study: Study,
    runs: Sequence[StudyRun],
    folder: Path,
    *,
    search: tuple[Searched, ...] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> StudyResult:
    """The runs' figures, the static models', a row of comparisons for each recipe, the answers.

    ``search`` and ``recipe`` are what ``offramp recipe`` adds.
    """
    check_equal_tokens(runs)
    done = [Done(run=run, folder=folder / run.name) for run in runs]
    check_equal_text(done)
    static = [entry for entry in done if entry.is_static]
    routed = [entry for entry in done if not entry.is_static]
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
        for kv in of_label[label][0].run.conventions
    ]
    result = StudyResult(
        study=study.name,
        question=study.question,
        text=runs[0].text.about,
        offramp_version=__version__,
        search=search,
        recipe=recipe,
        train_tokens=runs[0].tokens,
        test_tokens=done[0].record.test_tokens,
        seeds=tuple(seeds),
        compared_at=study.compared_at,
        area=(float(AREA[0]), float(AREA[-1])),
        static=tuple(comparison.static_model(entry) for entry in static),
        runs=tuple(comparison.routed_model(entry) for entry in routed),
        summary=tuple(corrected(rows, study)),
    )
    return replace(result, answers=tuple(answers(study, result)))


def corrected(rows: Sequence[Row], study: Study) -> list[Row]:
    """The rows with Holm's correction.

    Rows by one measure and with one meaning of ``missing_kv`` are a family; exact rows belong to
    that of ``propagate``, since both are what decoding does.
    """
    ratios = (*_RATIOS, *(_TO_BASELINE if study.baseline else ()))
    found = list(rows)
    of_row = [(row.confidence, row.missing_kv == "recompute") for row in rows]
    for family in dict.fromkeys(of_row):
        places = [place for place, mine in enumerate(of_row) if mine == family]
        for name in ratios:
            p_values = holm([_p_value(rows[place], name, study) for place in places])
            for place, p_value in zip(places, p_values, strict=True):
                changed: dict[str, Any] = {
                    name: replace(getattr(rows[place], name), p_holm=p_value)
                }
                found[place] = replace(found[place], **changed)
    return [replace(row, p_value=row.to_static.p_holm) for row in found]


def _p_value(row: Row, name: str, study: Study) -> float | None:
    """The p value of a tested ratio; None where the row makes no claim of it."""
    untested = study.shown_only | ({study.baseline} if name in _TO_BASELINE else set())
    ratio: TestedRatio = getattr(row, name)
    return None if row.label in untested else ratio.p_value


def check_equal_tokens(runs: Sequence[StudyRun]) -> None:
    """No summary compares runs that saw different numbers of tokens."""
    budgets = sorted({(run.tokens, run.test_tokens) for run in runs})
    if len(budgets) != 1:
        raise ValueError(f"runs: expected one budget of training and test tokens, got {budgets}")


def check_equal_text(done: Sequence[Done]) -> None:
    """No summary compares runs on different test texts."""
    found = {
        (entry.record.test_tokens, entry.record.config["text"]["test_sha256"]) for entry in done
    }
    if len(found) != 1:
        raise ValueError(f"runs: expected one test text, got {sorted(found)}")
