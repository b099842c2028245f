"""Finds the threshold at which decoding runs a given share of the layers."""

import numpy as np
import torch

from offramp.commands.bench.task import Task
from offramp.data import batches
from offramp.errors import ConfigError
from offramp.evaluation.trace import collect_trace

_SEARCH = 7
"""Number of times that the range of thresholds is halved; each decodes a few prompts."""
_QUANTILES = np.linspace(0.0, 1.0, 2**_SEARCH + 1)
_TRACED_TOKENS = 2048
_PROMPTS = 4


def threshold_for(compute_pct: float, task: Task, confidence: str) -> float:
    """The threshold of a measure at which decoding runs about ``compute_pct`` of the layers.

    A binary search over quantiles of the confidence at the exits on the prompts. Each candidate
    decodes the first prompts, because the share depends on the text that the model generates.
    """
    ladder = np.quantile(_scores(task, confidence), _QUANTILES)
    low, high = 0, len(ladder) - 1
    while high - low > 1:
        middle = (low + high) // 2
        share = _share(task, float(ladder[middle]), confidence)
        low, high = (low, middle) if share > compute_pct else (middle, high)
    return float(f"{ladder[low]:.4g}")


def _scores(task: Task, confidence: str) -> np.ndarray:
    """The confidence (exits - 1, tokens) at every exit but the last, on the prompts."""
    ids = torch.tensor([token for batch in task.prompts for prompt in batch for token in prompt])
    if len(ids) < 2:
        raise ConfigError("prompt_tokens: expected at least 2 with one prompt, got 1")
    length = min(task.config.prompt_tokens, len(ids) - 1)
    trace = collect_trace(
        task.model,
        batches(ids[: _TRACED_TOKENS + 1], seq_len=length, batch_size=4),
        measures=(confidence,),
        fitted=task.fitted,
    )
    return trace.scores(confidence)[:-1]


def _share(task: Task, threshold: float, confidence: str) -> float:
    """The share of the layers that run at a threshold, in percent."""
    method = task.method("", threshold=threshold, confidence=confidence)
    samples = [method.run(batch) for batch in task.prompts[:_PROMPTS]]
    run = sum(sample.work.layers_run for sample in samples if sample.work)
    return 100.0 * run / task.model.num_layers / sum(sample.count for sample in samples)
