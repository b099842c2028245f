"""Static models to compare with: the first layers of a model and an exit, on their own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from offramp.commands.evaluate.row import EvaluationRow
from offramp.commands.export import export_exit
from offramp.errors import UnsupportedArchitectureError
from offramp.evaluation.cost import model_cost
from offramp.models.model_files import ModelFiles
from offramp.models.open import DEFAULT_WINDOW, OpenedModel, open_model
from offramp.models.save import save_model


@contextmanager
def static_model(opened: OpenedModel, layer: int) -> Iterator[OpenedModel]:
    """Yield what ``offramp export`` makes of an exit, opened, from a temporary folder.

    Its texts begin and end as those of the whole model. Raises the errors of ``export_exit``.
    """
    with TemporaryDirectory(prefix="offramp-static-") as place:
        source: Path | ModelFiles | None = opened.files
        if source is None:
            source = Path(place) / "whole"
            save_model(opened, source)
        folder = Path(place) / f"static-{layer}"
        export_exit(source, layer, folder, dtype=opened.dtype)
        short = open_model(
            folder, device=opened.model.device, dtype=opened.dtype, weights=opened.weights
        )
        short.model.silence_untrained()
        yield replace(short, first_tokens=opened.first_tokens, end_tokens=opened.end_tokens)


def nearest_exits(opened: OpenedModel, rows: Sequence[EvaluationRow]) -> list[int]:
    """Return the exits whose static models cost about as much as the rows with a threshold.

    Each threshold gets the exit whose FLOPs, or else whose number of layers, are the closest to
    the mean of its rows.
    """
    early = opened.model.exit_layers[:-1]
    if not early:
        return []
    try:
        cost = model_cost(opened.model, context=DEFAULT_WINDOW / 2, fitted=opened.fitted)
        by_exit = cost.flops_pct_by_exit("max_prob", evaluated=[False] * len(early))
        costs = dict(zip(early, by_exit, strict=False))
    except UnsupportedArchitectureError:
        costs = {layer: float(layer) for layer in early}
    found: list[int] = []
    for method in dict.fromkeys(row.method for row in rows if row.threshold is not None):
        spent = [
            (row.mean_layers if row.flops_pct is None else row.flops_pct, row.tokens)
            for row in rows
            if row.method == method
        ]
        tokens = sum(count for value, count in spent if value is not None)
        if tokens:
            mean = sum(value * count for value, count in spent if value is not None) / tokens
            found.append(min(early, key=lambda layer: abs(costs[layer] - mean)))
    return sorted(set(found))
