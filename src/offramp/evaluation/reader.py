"""Read the states of a batch at all exits, one chunk of tokens at a time."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits.confidence import Agreement, Confidence, ExitView
from offramp.exits.gate import FittedExits
from offramp.models.base import EarlyExitModel

CHUNK_LOGITS = 4_000_000
"""Largest number of logits of one exit that exist at once; 16 MB in float32."""


@dataclass(frozen=True, kw_only=True)
class ChunkReader:
    """Reads the states of a batch, one chunk of tokens at a time.

    The logits over a large vocabulary are in memory for one chunk only.
    """

    model: EarlyExitModel
    layers: tuple[int, ...]
    measures: Mapping[str, Confidence]
    fitted: FittedExits
    kl: bool

    def batch(self, states: Mapping[int, Tensor], targets: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name of an array, its next tokens) of ``states`` (N, D) and ``targets`` (N,)."""
        size = max(1, CHUNK_LOGITS // self.model.vocab_size)
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            yield from self.chunk(
                {layer: h[None, rows] for layer, h in states.items()}, targets[rows]
            )

    def chunk(self, states: Mapping[int, Tensor], targets: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the arrays of one chunk, as ``batch``: states (1, n, D), targets (n,)."""
        arrays: dict[str, list[Tensor]] = defaultdict(list)
        last: Tensor | None = None
        if self.kl:
            last = F.log_softmax(_logits(self.model, states, self.layers[-1]), dim=-1)
        earlier: Agreement | None = None
        for layer in self.layers:
            view = ExitView(
                exit_layer=layer,
                logits=partial(_logits, self.model, states, layer),
                state=states[layer],
                previous_state=states.get(layer - 1),
                earlier=earlier,
                fitted=self.fitted,
            )
            log_probs = view.log_probs
            if (
                self.fitted.temperature(layer) != 1
            ):  # temperatures are for confidence, not for the loss
                log_probs = F.log_softmax(view.logits, dim=-1)
            arrays["nll"].append(-log_probs[0].gather(1, targets[:, None])[:, 0])
            arrays["argmax"].append(view.argmax[0])
            if last is not None:
                arrays["kl"].append(_kl(last, log_probs)[0])
            for name, measure in self.measures.items():
                arrays[f"confidence.{name}"].append(self.score(name, measure, view)[0])
            if "gain" in self.measures and layer != self.layers[-1]:
                arrays["expected_kl"].append(self.expected_kl(view))
            earlier = view.agreement
        for name, rows in arrays.items():
            stacked = torch.stack(rows)
            yield name, stacked.float() if stacked.is_floating_point() else stacked

    def score(self, name: str, measure: Confidence, view: ExitView) -> Tensor:
        """Return the scores (1, n) of a measure; the last layer of the model has no gate."""
        if measure.needs_gate and view.exit_layer == self.model.num_layers:
            certain = 0.0 if name == "gain" else 1.0
            return torch.full(view.state.shape[:2], certain, device=view.state.device)
        return measure.score(view)

    def expected_kl(self, view: ExitView) -> Tensor:
        """Return the ``gain`` predictions (E - 1, n), with NaN for exits before this one."""
        early = [layer for layer in self.layers if layer != self.layers[-1]]
        before = early.index(view.exit_layer)
        expected = view.expected_kl[0].T  # (K, n)
        if before + len(expected) != len(early):
            raise ConfigError(
                f"gain: expected a gate at exit layer {view.exit_layer} for the "
                f"{len(early) - before} exits {early[before:]}, got one for {len(expected)}"
            )
        return F.pad(expected, (0, 0, before, 0), value=math.nan)


def _logits(model: EarlyExitModel, states: Mapping[int, Tensor], layer: int) -> Tensor:
    """Return the logits (1, n, V) of a layer, in float32 or a wider type."""
    logits = model.unembed(states[layer], layer)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) in nats, from log-probabilities in the last dimension; at least 0."""
    least = torch.finfo(p.dtype).min  # a token without probability under both adds nothing
    p, q = p.clamp(min=least), q.clamp(min=least)
    return (p.exp() * (p - q)).sum(dim=-1).clamp(min=0)
