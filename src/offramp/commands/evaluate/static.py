"""Static models to compare with: the first layers of a model and an exit, on their own."""

from collections.abc import Sequence

from offramp.commands.evaluate.row import EvaluationRow
from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.evaluation.cost import model_cost
from offramp.models.open import DEFAULT_WINDOW, OpenedModel


def check_static(opened: OpenedModel, layers: Sequence[int] | None) -> None:
    """Raise a ConfigError for layers that are no exits of the model before its last layer."""
    early = opened.model.exit_layers[:-1]
    for layer in layers or ():
        if layer not in early:
            raise ConfigError(
                f"static: expected exits of the model before its last layer, "
                f"{', '.join(map(str, early)) or 'of which it has none'}, got {layer}"
            )


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
