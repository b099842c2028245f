"""A bounded sample of states and their trace, for fitting gates and temperatures."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from offramp.errors import ConfigError
from offramp.evaluation.trace import ExitTrace, collect_trace
from offramp.models.base import EarlyExitModel

LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True, kw_only=True)
class ExitSample:
    """States at every exit and a trace of the same tokens, with ``kl``, without confidence."""

    states: dict[int, Tensor]
    "(N, D) in float16, by exit layer, the last layer included."
    dtype: torch.dtype
    "The precision of the states in the model."
    trace: ExitTrace


def collect_sample(
    model: EarlyExitModel,
    batches: Iterable[tuple[Int[Tensor, "B S"], Int[Tensor, "B T"]]],
    *,
    max_tokens: int,
) -> ExitSample:
    """Run the model once over batches until there are ``max_tokens``, or no more batches.

    The states need max_tokens x exits x width x 2 bytes. The batches should be in a random order,
    so that the sample represents the whole text. Raises ConfigError for ``max_tokens`` below 1.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens: expected at least 1, got {max_tokens}")
    parts: dict[int, list[Tensor]] = {layer: [] for layer in model.exit_layers}
    dtypes: set[torch.dtype] = set()

    def keep(states: Mapping[int, Tensor]) -> None:
        for layer, h in states.items():
            dtypes.add(h.dtype)
            clipped = h.float().clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16)
            parts[layer].append(clipped.half().cpu())

    trace = collect_trace(
        model, first_tokens(batches, max_tokens), measures=(), kl=True, on_states=keep
    )
    states = {layer: torch.cat(found) for layer, found in parts.items()}
    return ExitSample(states=states, dtype=dtypes.pop(), trace=trace)


def first_tokens(
    batches: Iterable[tuple[Tensor, Tensor]], max_tokens: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield batches up to ``max_tokens`` tokens; the last batch is cut to complete windows."""
    left = max_tokens
    for inputs, targets in batches:
        windows = -(-left // targets.shape[1])
        yield inputs[:windows], targets[:windows]
        left -= targets[:windows].numel()
        if left <= 0:
            return
