"""One way to run the model on the tasks, and its rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offramp.commands.evaluate.config import EvaluateConfig
from offramp.commands.evaluate.counts import TaskCounts
from offramp.commands.evaluate.library import harness
from offramp.commands.evaluate.row import EvaluationRow
from offramp.commands.evaluate.scoring import Scoring
from offramp.commands.evaluate.tasks import Tasks
from offramp.data.hub import one_line
from offramp.errors import ConfigError, OfframpError
from offramp.exits.default_confidence import Threshold

ALL_FILTERS = "none"
"""The harness's name of the filter that changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A name and how its requests are run."""

    name: str
    scoring: Scoring
    threshold: Threshold | None = None
    "As the user gave it; None for full depth and for a certificate's own."


def run_method(
    method: Method, tasks: Tasks, config: EvaluateConfig, *, on_requests: Any
) -> list[EvaluationRow]:
    """Run the tasks, and return a row for each task and each group of tasks.

    Raises ConfigError for a task that fails while its requests are built or its answers are scored.
    """
    from offramp.commands.evaluate.model import ScoringModel

    model = ScoringModel(method.scoring, on_requests=on_requests)
    with tasks.running():
        try:
            found = harness("evaluator").evaluate(
                lm=model,
                task_dict=dict(tasks.loaded),
                limit=config.limit,
                bootstrap_iters=config.bootstrap_iters,
                log_samples=False,
                confirm_run_unsafe_code=tasks.trusted,
                apply_chat_template=config.apply_chat_template,
                fewshot_as_multiturn=config.apply_chat_template,
                system_instruction=config.system_instruction,
            )
        except OfframpError:
            raise
        except Exception as error:  # the code and the templates of a task can fail in any way
            if model.raised is error:
                raise
            raise ConfigError(
                f"tasks: expected documents and answers that their tasks can read, got: "
                f"{one_line(error)}"
            ) from None
    return rows_of(method, found, model.counts)


def rows_of(
    method: Method, found: Mapping[str, Any], counts: Mapping[str, TaskCounts]
) -> list[EvaluationRow]:
    """Return the rows of the harness's results."""
    return [
        _row(method, name, results, found, counts) for name, results in found["results"].items()
    ]


def _row(
    method: Method,
    name: str,
    results: Mapping[str, Any],
    found: Mapping[str, Any],
    counts: Mapping[str, TaskCounts],
) -> EvaluationRow:
    metrics, stderr = _metrics(results)
    leaves = [counts[leaf] for leaf in _leaves(name, found["group_subtasks"]) if leaf in counts]
    empty = TaskCounts(missing_kv=method.scoring.missing_kv)
    total = empty.merged(leaves)
    rule = method.scoring.rule
    figures = total.figures(method.scoring.opened, rule, depth=method.scoring.model.num_layers)
    shots = found["n-shot"].get(name)
    better = found["higher_is_better"].get(name) or {}
    return EvaluationRow(
        task=name,
        method=method.name,
        metrics=metrics,
        stderr=stderr,
        **asdict(figures),
        documents=results.get("sample_len"),
        num_fewshot=shots if isinstance(shots, int) else None,
        truncated=total.truncated,
        missing_kv=method.scoring.meaning,
        confidence=None if rule is None else rule.confidence,
        threshold=method.threshold,
        higher_is_better={metric: better.get(metric.partition(" ")[0]) for metric in metrics},
    )


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks of a group, or the task itself."""
    if name not in groups:
        return [name]
    return list(dict.fromkeys(leaf for part in groups[name] for leaf in _leaves(part, groups)))


def _metrics(
    results: Mapping[str, Any],
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Return the metrics and their standard errors, by name."""
    metrics: dict[str, float | None] = {}
    stderr: dict[str, float | None] = {}
    for key, value in results.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        name = metric if chosen == ALL_FILTERS else f"{metric} ({chosen})"
        metrics[name] = _number(value)
        stderr[name] = _number(results.get(f"{metric}_stderr,{chosen}"))
    return metrics, stderr


def _number(value: Any) -> float | None:
    """Return a finite figure as a plain number; None for "N/A" and what is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
