"""What ``offramp evaluate`` does: the tasks at one threshold, or many ways side by side."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from offramp.commands.evaluate.config import EvaluateConfig
from offramp.commands.evaluate.method import Method, run_method
from offramp.commands.evaluate.row import EvaluationRow
from offramp.commands.evaluate.scoring import Scoring, scoring_of
from offramp.commands.evaluate.static import check_static, nearest_exits
from offramp.commands.evaluate.tasks import Tasks
from offramp.commands.evaluate.tokens import prefix_token
from offramp.errors import ConfigError
from offramp.exits.default_confidence import Threshold
from offramp.generation.config import GenerateConfig
from offramp.models.open import OpenedModel
from offramp.report.text import threshold_text

OnProgress = Callable[[int, int, str], None]
"""Called with (requests done, requests in all, method and task)."""
DEFAULT_THRESHOLDS: tuple[float, ...] = (0.5, 0.7, 0.9)
_OTHER_DEFAULTS: dict[str | None, tuple[float, ...]] = {
    "patience": (1.0, 2.0, 3.0),
    "gain": (-0.5, -0.2, -0.1),  # nats
}
FULL = "full"


def evaluate(
    opened: OpenedModel,
    tasks: Tasks,
    config: EvaluateConfig,
    exits: GenerateConfig,
    *,
    thresholds: Sequence[Threshold] | None = None,
    on_progress: OnProgress = lambda done, total, text: None,
) -> dict[str, Any]:
    """What ``offramp evaluate`` writes: a row for each task and each way to run the model.

    ``exits`` says where tokens leave. With ``config.compare`` full depth runs first, then each of
    ``thresholds`` (default: that of ``exits``, or three), then static models of the first layers.

    Raises ConfigError for options that the model or a task does not support.
    """
    check_thresholds(config, exits, thresholds)
    chosen = _thresholds(config, exits, thresholds)
    prefix = prefix_token(opened, config.prefix_token)

    def scoring(threshold: Threshold | None, static: int | None = None) -> Scoring:
        return scoring_of(
            opened,
            GenerateConfig() if threshold is None else replace(exits, threshold=threshold),
            batch_size=config.batch_size,
            max_length=config.max_length,
            prefix=prefix,
            static=static,
        )

    check_static(opened, config.static)
    rows: list[EvaluationRow] = []
    for method in [_method(scoring(threshold), threshold) for threshold in chosen]:
        rows += _run(method, tasks, config, on_progress)
    for layer in _static(opened, config, rows):
        method = Method(name=f"static@{layer}", scoring=scoring(None, layer))
        rows += _run(method, tasks, config, on_progress)
    return {
        "num_layers": opened.model.num_layers,
        "exit_layers": list(opened.model.exit_layers),
        "complete_from": opened.model.complete_from,
        "untrained": not opened.exits_trained,
        "bos": bool(opened.first_tokens),
        "dtype": opened.precision,
        **({} if opened.weights is None else {"weights": opened.weights}),
        "harness": f"lm-eval {version('lm-eval')}",
        "config": asdict(config),
        "evaluations": [asdict(row) for row in rows],
    }


def check_thresholds(
    config: EvaluateConfig, exits: GenerateConfig, thresholds: Sequence[Threshold] | None
) -> None:
    """Raise a ConfigError for thresholds that do not fit the other options."""
    if thresholds is not None and not config.compare:
        raise ConfigError("thresholds: expected none without compare; threshold takes one")
    if thresholds is not None and exits.threshold is not None:
        raise ConfigError("thresholds: expected none with a threshold or a certificate")
    if thresholds is not None and not thresholds:
        raise ConfigError("thresholds: expected at least one, got none")


def _thresholds(
    config: EvaluateConfig, exits: GenerateConfig, thresholds: Sequence[Threshold] | None
) -> list[Threshold | None]:
    """Return the threshold of each way to run the model; None is full depth."""
    if not config.compare:
        return [exits.threshold]
    if thresholds is None and exits.threshold is not None:
        thresholds = [exits.threshold]
    elif thresholds is None:
        thresholds = _OTHER_DEFAULTS.get(exits.confidence, DEFAULT_THRESHOLDS)
    return [None, *dict.fromkeys(thresholds)]


def _static(
    opened: OpenedModel, config: EvaluateConfig, rows: Sequence[EvaluationRow]
) -> Sequence[int]:
    if not config.compare:
        return ()
    if config.static is None:
        return nearest_exits(opened, rows)
    return tuple(dict.fromkeys(config.static))


def _method(scoring: Scoring, threshold: Threshold | None) -> Method:
    if threshold is None:
        return Method(name=FULL, scoring=scoring)
    return Method(name=f"exit@{threshold_text(threshold)}", scoring=scoring, threshold=threshold)


def _run(
    method: Method, tasks: Tasks, config: EvaluateConfig, on_progress: OnProgress
) -> list[EvaluationRow]:
    return run_method(
        method,
        tasks,
        config,
        on_requests=lambda task, done, total: on_progress(done, total, f"{method.name}, {task}"),
    )
