"""The rule of the exits as a model's router reads it (models/router.py)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from torch import Tensor

from offramp.exits.gate import GATE_KINDS
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.models.missing_kv import MissingKV
from offramp.models.router import GateRule, RouterSpec

if TYPE_CHECKING:
    from offramp.generation.exit_rule import ExitRule
    from offramp.generation.ladder import Ladder


def router_spec(
    rule: "ExitRule | None",
    exits: Sequence[int],
    *,
    missing_kv: MissingKV,
    tokens: int,
    ladder: "Ladder" = (),
) -> RouterSpec | None:
    """Return what a router needs to know of a rule; None for a confidence that is no gate's.

    ``exits`` are the model's exit layers, and ``tokens`` is the largest number of new tokens of a
    row, for which bounds are computed if the threshold decays. With a ``ladder`` of the rule the
    bounds are those of all its rungs, one rung after another. There are none for a ``GainPolicy``,
    so it has no router then.
    """
    if rule is None:
        return RouterSpec()
    name, policy = rule.confidence, rule.policy
    if name not in GATE_KINDS:
        return None
    policies: list[ThresholdPolicy | GainPolicy] = [policy]
    if isinstance(policy, GainPolicy):
        if ladder or name != "gain":
            return None
    elif ladder:
        never = replace(policy, thresholds=(math.inf,) * (len(exits) - 1))
        policies = [never if each is None else each.policy for each in ladder]
    return RouterSpec(
        exits=tuple(
            GateRule(
                layer=layer,
                gate=rule.fitted.gate(name, layer),
                bounds=torch.cat([_bounds(each, index, tokens) for each in policies]),
                extra=policy.extra(index) if isinstance(policy, GainPolicy) else None,
            )
            for index, layer in enumerate(exits[:-1])
        ),
        score=cast(Literal["gate", "gain"], name),
        recompute=missing_kv == "recompute",
    )


def _bounds(policy: ThresholdPolicy | GainPolicy, index: int, tokens: int) -> Tensor:
    if isinstance(policy, GainPolicy):
        return torch.zeros(1)
    places = None if policy.decay is None else np.arange(tokens)
    bounds = policy.bound(index, np.dtype("float32"), places)
    return torch.from_numpy(np.atleast_1d(np.asarray(bounds, dtype=np.float32)))
