"""The gates of exits that were just tuned: ``offramp tune`` fits them to its own text."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from offramp.calibration.fitting import fit_gates
from offramp.commands.text import LARGEST_LOGITS
from offramp.data.windows import batches
from offramp.evaluation.sample import collect_sample
from offramp.exits.gate import GATE_KINDS, Gate, GateConfig
from offramp.models.base import EarlyExitModel
from offramp.training.frozen import TuneProgress

GATE_TOKENS = 32_768
"""Tokens of the text to which gates are fitted, at the most; they are drawn at random."""
PASSES, FEWEST_STEPS, MOST_STEPS = 40, 50, 1000
"""A gate is fitted in so many passes over these tokens, within these numbers of steps."""


def gates_of(
    model: EarlyExitModel,
    ids: Int[Tensor, " N"],
    *,
    seq_len: int,
    seed: int,
    first_tokens: Sequence[int] = (),
    on_progress: Callable[[TuneProgress], None],
) -> tuple[dict[str, dict[int, Gate]], dict[str, Any]]:
    """Fit gates of each kind to windows of a text; return them, and what is recorded of them."""
    seq_len = min(seq_len, max(1, model.max_length - len(first_tokens)))
    rows = max(1, min(8, LARGEST_LOGITS // (seq_len * model.vocab_size)))
    order = torch.Generator().manual_seed(seed)
    total = min(GATE_TOKENS, len(ids) - 1)

    def counted() -> Iterator[Any]:
        done = 0
        for inputs, targets in batches(
            ids, seq_len=seq_len, batch_size=rows, order=order, first=first_tokens
        ):
            yield inputs, targets
            done = min(total, done + targets.numel())
            on_progress(TuneProgress(doing="sample", done=done, total=total))

    sample = collect_sample(model, counted(), max_tokens=GATE_TOKENS)
    tokens = sample.trace.num_tokens
    config = GateConfig(seed=seed)
    steps = PASSES * tokens // config.batch_size
    config = GateConfig(seed=seed, steps=max(FEWEST_STEPS, min(MOST_STEPS, steps)))
    done = count(1)
    every = len(GATE_KINDS) * (len(model.exit_layers) - 1)

    def on_gate() -> None:
        on_progress(TuneProgress(doing="gates", done=next(done), total=every))

    gates = {kind: fit_gates(kind, sample, config, on_gate=on_gate) for kind in GATE_KINDS}
    return gates, {"kinds": list(GATE_KINDS), "tokens": tokens, "steps": config.steps}
