"""What a study found of models whose blocks share keys and values, in words.

Static models separate the architecture's own effect from that of the exits: a model that shares
keys and values stands beside the standard one, and one with exits beside a static one of the same
source.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from offramp.report.study_result import Row, StaticModel, StudyResult
from offramp.report.text import p_phrase
from offramp.studies.statistics import Seeds, holm, paired_test


def shared_answers(result: StudyResult, rows: Sequence[Row]) -> Iterator[str]:
    """Sentences on static models of full depth that share keys and values; none without them.

    ``rows`` are the recipes of which claims are made.
    """
    if all(model.source is None for model in result.static):
        return
    depth = max(model.layers for model in result.static)
    full = {
        source: models
        for (layers, source), models in result.static_kinds.items()
        if layers == depth
    }
    standard = _log_ppl(full.pop(None))
    differences = [_log_ppl(models) - standard for models in full.values()]
    yield (
        "Sharing keys and values alone, without exits: compared with the standard model, the PPL "
        f"of a model of {depth} layers is "
        + "; ".join(
            f"{_change(difference)} ({p_phrase(p)}) with source {source}, at "
            f"{models[0].flops_pct:.1f}% of the FLOPs"
            for (source, models), difference, p in zip(
                full.items(), differences, _tested(differences), strict=True
            )
        )
        + "."
    )
    sources = {run.label: run.config["model"].get("kv_source_layer") for run in result.runs}
    paired = [(row, full[sources[row.label]]) for row in rows if sources[row.label] in full]
    differences = [
        np.log(np.asarray(row.final_ppl.values, dtype=np.float64)) - _log_ppl(models)
        for row, models in paired
    ]
    if not paired:
        return
    yield (
        "Exits alone: compared with the static model of the same source, the last layer's PPL is "
        + "; ".join(
            f"{_change(difference)} with {row.label} ({p_phrase(p)})"
            for (row, _), difference, p in zip(
                paired, differences, _tested(differences), strict=True
            )
        )
        + "."
    )


def _log_ppl(models: Sequence[StaticModel]) -> Seeds:
    """Log PPL of each seed."""
    by_seed = sorted(models, key=lambda model: model.seed)
    return np.log(np.asarray([model.ppl for model in by_seed], dtype=np.float64))


def _tested(differences: Sequence[Seeds]) -> list[float | None]:
    return holm([paired_test(difference) for difference in differences])


def _change(difference: Seeds) -> str:
    change = 100.0 * float(np.expm1(difference.mean()))
    return f"{abs(change):.1f}% {'higher' if change > 0 else 'lower'}"
