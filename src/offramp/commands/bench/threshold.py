"""Finds the threshold at which decoding runs a given share of the layers."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from offramp.commands.bench.task import Task
from offramp.data import batches
from offramp.errors import ConfigError
from offramp.evaluation.trace import collect_trace
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate_batch

_PROMPTS, _TEXTS = 8, 6
"""Prompts that are decoded together, and how often at most."""
_NEW = 64
"""New tokens of each prompt, at most."""
_CLOSE = 1.0
"""A share is right if it is at most so many percentage points off."""
_QUANTILES = np.linspace(0.0, 1.0, 1025)


def threshold_for(compute_pct: float, task: Task, confidence: str) -> float:
    """Return the threshold of a measure at which decoding runs about this percentage of the layers.

    The share depends on the text that the model generates, and that text on the threshold. So the
    first threshold is that of the prompts' own tokens; with it the first prompts are decoded,
    together, and the next threshold is that of all new tokens so far. If it is not between those
    that were just too low and too high, it is their mean. The one that came closest is returned,
    after a few texts at most.
    """
    prompts = [list(prompt) for batch in task.prompts for prompt in batch][:_PROMPTS]
    shortest = min(map(len, prompts))
    prompts = [prompt[-shortest:] for prompt in prompts]
    # the first new token comes from the prompt, at full depth
    new = min(task.config.max_new_tokens - 1, _NEW)
    seen = [_scores(task, confidence, _windows(task, prompts))]
    tried: list[tuple[float, float]] = []  # percentage of the layers, threshold
    for _ in range(_TEXTS):
        threshold = _between(_threshold(compute_pct, task, np.hstack(seen)), tried, compute_pct)
        if any(threshold == each for _, each in tried):
            break
        config = GenerateConfig(max_new_tokens=new + 1, threshold=threshold, confidence=confidence)
        completions, work = generate_batch(task.model, prompts, config, fitted=task.fitted)
        share = 100.0 * work.layers_run / task.model.num_layers / (new * len(prompts))
        if abs(share - compute_pct) < _CLOSE:
            return threshold
        pairs = zip(prompts, completions, strict=True)
        texts = torch.tensor([[*prompt, *completion.ids] for prompt, completion in pairs])
        scores = _scores(task, confidence, [(texts[:, :-1], texts[:, -new:])])
        seen = [*seen, scores] if tried else [scores]  # the prompts gave the first one only
        tried.append((share, threshold))
    return min(tried, key=lambda each: abs(each[0] - compute_pct))[1]


def _between(threshold: float, tried: Sequence[tuple[float, float]], wanted: float) -> float:
    """Return a threshold, or the mean of the closest ones that ran too few and too many layers."""
    few = [each for share, each in tried if share < wanted]
    many = [each for share, each in tried if share > wanted]
    if few and many and not max(few) < threshold < min(many):
        threshold = (max(few) + min(many)) / 2
    return float(f"{threshold:.4g}")


def _windows(task: Task, prompts: Sequence[Sequence[int]]) -> Iterable[tuple[Tensor, Tensor]]:
    """Return the tokens of the prompts, one after the other, in windows of a prompt's length."""
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    if len(ids) < 2:
        raise ConfigError("prompt_tokens: expected at least 2 with one prompt, got 1")
    return batches(ids, seq_len=min(task.config.prompt_tokens, len(ids) - 1), batch_size=_PROMPTS)


def _scores(
    task: Task, confidence: str, windows: Iterable[tuple[Tensor, Tensor]]
) -> Float[NDArray[np.float32], "E N"]:
    """Return the confidence at each early exit, for the tokens that are predicted."""
    trace = collect_trace(task.model, windows, measures=(confidence,), fitted=task.fitted)
    return trace.scores(confidence)[:-1]


def _threshold(compute_pct: float, task: Task, scores: Float[NDArray[np.float32], "E N"]) -> float:
    """Return the threshold at which these tokens run about this percentage of the layers."""
    best = np.maximum.accumulate(
        scores, axis=0
    )  # a token has left where this reaches the threshold
    ladder = np.quantile(scores, _QUANTILES)
    later = np.diff(task.model.exit_layers) / task.model.num_layers
    stayed = (best[:, :, None] < ladder.astype(scores.dtype)).mean(axis=1)  # (E, thresholds)
    shares = 100.0 * (task.model.exit_layers[0] / task.model.num_layers + later @ stayed)
    return float(ladder[np.abs(shares - compute_pct).argmin()])
