"""Evaluate one policy on a text under ``missing_kv="propagate"``: exits and losses of the tokens.

Later states depend on where earlier tokens left, so every policy needs a separate pass. Within a
pass all tokens are computed in parallel (models/propagate.py).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from offramp.evaluation.reader import CHUNK_LOGITS
from offramp.exits.confidence import Agreement, ExitView, confidence_named
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.models.base import EarlyExitModel, whole_step
from offramp.models.propagate import run_propagated


@dataclass(frozen=True, kw_only=True)
class RoutedTrace:
    """The exit and loss of each token, in the order in which the tokens were read."""

    exit_layers: tuple[int, ...]
    exits: NDArray[np.intp]
    "(N,) Index of the exit where the token left."
    nll: NDArray[np.float32]
    "(N,) Negative log-likelihood of the target at that exit, in nats."
    sequence: NDArray[np.int32]
    "(N,) The number of the token's window, from 0."


class Leaving:
    """Says which tokens leave at an exit; it is called at each early exit, in their order.

    The tokens of all calls are the same. ``confidence`` names what the policy reads.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        policy: ThresholdPolicy | GainPolicy,
        *,
        confidence: str,
        fitted: FittedExits,
    ) -> None:
        self._model, self._policy, self._fitted = model, policy, fitted
        self._measure = confidence_named(confidence)
        self._counts = confidence == "patience"
        self._agreement: Agreement | None = None

    @property
    def needs_previous_state(self) -> bool:
        """Whether the confidence reads the state one block before the exit."""
        return self._measure.needs_previous_state

    def __call__(
        self, layer: int, h: Tensor, previous: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Return (B, T), True for tokens that would leave, from the states (B, T, S) at an exit.

        ``positions`` (B, T) are needed if the threshold decays.
        """
        index = self._model.exit_layers.index(layer)
        view = ExitView(
            exit_layer=layer,
            logits=partial(self._model.unembed, h, layer),
            state=h,
            previous_state=previous,
            earlier=self._agreement,
            fitted=self._fitted,
        )
        policy = self._policy
        if isinstance(policy, GainPolicy):
            return policy.leaves(index, view.expected_kl)
        if math.isinf(policy.thresholds[index]):
            return torch.full(h.shape[:2], policy.thresholds[index] < 0, device=h.device)
        scores = self._measure.score(view)
        if self._counts:
            self._agreement = view.agreement
        return policy.leaves(index, scores, positions if policy.decay else None)


@torch.inference_mode()
def collect_routed(
    model: EarlyExitModel,
    batches: Iterable[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]],
    policy: ThresholdPolicy | GainPolicy,
    *,
    confidence: str = "max_prob",
    fitted: FittedExits = NOTHING_FITTED,
) -> RoutedTrace:
    """Run the model over (inputs, targets); the policy decides where each token leaves."""
    exit_layers = tuple(model.exit_layers)
    exits, nll, sequence, sequences = [], [], [], 0
    for inputs, targets in batches:
        inputs, targets = inputs.to(model.device), targets.to(model.device)
        leaving = Leaving(model, policy, confidence=confidence, fitted=fitted)
        h, layers = run_propagated(
            model,
            inputs,
            partial(leaving, positions=torch.arange(inputs.shape[1]).expand(inputs.shape)),
            step=whole_step(inputs),
            needs_previous_state=leaving.needs_previous_state,
        )
        nll.append(_nll(model, h.flatten(0, 1), layers.flatten(), targets.flatten()).cpu())
        places = torch.tensor(exit_layers, device=layers.device)
        exits.append(torch.searchsorted(places, layers.flatten()).cpu())
        rows, length = targets.shape
        sequence.append(torch.arange(sequences, sequences + rows).repeat_interleave(length))
        sequences += rows
    return RoutedTrace(
        exit_layers=exit_layers,
        exits=torch.cat(exits).numpy(),
        nll=torch.cat(nll).numpy(),
        sequence=torch.cat(sequence).int().numpy(),
    )


def _nll(
    model: EarlyExitModel, h: Float[Tensor, "N D"], layers: Int[Tensor, " N"], targets: Tensor
) -> Float[Tensor, " N"]:
    """Return the loss of each token at the exit where it left, in nats."""
    nll = torch.empty(len(h), device=h.device)
    size = max(1, CHUNK_LOGITS // model.vocab_size)
    for layer in model.exit_layers:
        here = (layers == layer).nonzero()[:, 0]
        for rows in here.split(size) if len(here) else ():
            logits = model.unembed(h[None, rows], layer)[0].float()
            nll[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
    return nll
