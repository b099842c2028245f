"""A row of ``offramp evaluate``: one way to run the model on one task."""

from dataclasses import dataclass

Threshold = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """The metrics of a task or a group of tasks, and what its tokens cost."""

    task: str
    method: str
    "full, exit@THRESHOLD, or static@LAYER: the first layers as a model of their own."
    metrics: dict[str, float | None]
    "The harness's metrics, such as acc; with a filter's name in brackets if the task has several."
    stderr: dict[str, float | None]
    "The harness's standard error of each metric; None where it has none."
    mean_layers: float | None
    """Mean number of blocks that ran for a scored or generated token, deferred ones included. The
    first token of a text counts with all layers."""
    flops_pct: float | None
    "FLOPs of these tokens, with heads and gates, in percent of the full model."
    tokens_per_s: float | None
    "Scored or generated tokens divided by the seconds of the model, which include the contexts."
    tokens: int
    "Number of scored or generated tokens."
    context_tokens: int
    "Number of tokens of the contexts, which run at full depth."
    documents: int | None
    "Number of documents; None where the harness counts none."
    num_fewshot: int | None
    "Number of solved examples before each question."
    truncated: int
    "Number of requests that were too long and lost tokens at their start."
    missing_kv: str | None
    "propagate, recompute, or exact if all exits are complete; None where no token exits."
    confidence: str | None
    threshold: Threshold | None
    "As the user gave it."
    higher_is_better: dict[str, bool | None]
