"""Gates: small networks that decide from an exit's state, without the LM head, who may leave.

- ``gate`` predicts whether the last layer predicts the same token: a class-balanced logistic
  regression of argmax_e == argmax_L (CALM, Schuster et al. 2022, section 3.3; FREE, Bae et al.
  2023).
- ``gain`` predicts how much deeper layers would change the prediction: a regression of
  KL(p_L || p_e) in nats. With it a token may also leave if it is uncertain but deeper layers
  would not change its prediction.

A gate costs less than D x D multiplications, and an exit with one needs the LM head only for the
tokens that leave there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from offramp.errors import ConfigError

GateKind = Literal["gate", "gain"]
GATE_KINDS: tuple[str, ...] = get_args(GateKind)

LARGEST_HIDDEN = 128
"""Largest number of hidden units of a gate, for models of any width."""


class Gate(nn.Module):
    """A gate: RMSNorm -> Linear(D, hidden) -> SiLU -> Linear(hidden, outputs), on exit states."""

    def __init__(self, hidden_size: int, *, outputs: int = 1, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or min(hidden_size, LARGEST_HIDDEN)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.up_proj = nn.Linear(hidden_size, hidden)
        self.out_proj = nn.Linear(hidden, outputs)

    def forward(self, h: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """Return the outputs before a sigmoid or softplus, in the gate's precision, float32."""
        h = self.norm(h.to(self.up_proj.weight.dtype))
        out: Tensor = self.out_proj(F.silu(self.up_proj(h)))
        return out


def gate_of(state: Mapping[str, Tensor]) -> Gate:
    """Make a gate from its parameters. Raises an error if parameters are missing."""
    hidden, hidden_size = state["up_proj.weight"].shape
    gate = Gate(hidden_size, outputs=len(state["out_proj.bias"]), hidden=hidden)
    gate.load_state_dict(dict(state))
    return gate.to(torch.float32).eval().requires_grad_(False)


def agreement_probability(out: Float[Tensor, "*B 1"]) -> Float[Tensor, "*B"]:
    """Convert the output of a ``gate`` to the probability that the last layer agrees."""
    return torch.sigmoid(out[..., 0])


def expected_kl(out: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
    """Convert the outputs of a ``gain`` gate to KL(p_L || p) in nats at this and later exits."""
    return F.softplus(out)


@dataclass(frozen=True, kw_only=True, repr=False)
class FittedExits:
    """The gates, temperatures and draft vocabulary that were fitted to a trained model's exits.

    A ``gain`` gate at exit e has one output for e and one for each exit between e and the last,
    in this order. A ``gate`` has one output.
    """

    gates: Mapping[str, Mapping[int, Gate]] = field(default_factory=dict)
    "Gates by kind and exit layer."
    temperatures: Mapping[int, float] = field(default_factory=dict)
    "Temperatures by exit layer; a layer that is missing has temperature 1."
    draft_vocab: Int[Tensor, " W"] | None = None
    """Ids of the tokens that a draft may contain, the most frequent ones; None for all tokens. The
    head of the draft is then a slice of the LM head, and costs proportionally less."""
    bos: bool | None = None
    """Whether the model's first tokens, such as BOS, began the windows to which gates and
    temperatures were fitted; None if unknown."""

    def __repr__(self) -> str:
        gates = {kind: sorted(by_layer) for kind, by_layer in self.gates.items()}
        drafts = 0 if self.draft_vocab is None else len(self.draft_vocab)
        return (
            f"FittedExits(gates at {gates}, temperatures {dict(self.temperatures)}, "
            f"{drafts:,} tokens to draft)"
        )

    def gate(self, kind: str, exit_layer: int) -> Gate:
        """Return the gate of an exit. Raises ConfigError if none was fitted."""
        try:
            return self.gates[kind][exit_layer]
        except KeyError:
            raise ConfigError(
                f"confidence: expected a fitted {kind} at exit layer {exit_layer}, found none; "
                "fit it with: offramp confidence MODEL --corpus TEXT --fit TRAINING_TEXT"
            ) from None

    def temperature(self, exit_layer: int) -> float:
        """Return the number by which the exit's logits are divided before the softmax."""
        return self.temperatures.get(exit_layer, 1.0)


NOTHING_FITTED = FittedExits()


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Options for fitting a gate."""

    steps: int = 1000
    "Number of AdamW steps."
    batch_size: int = 1024
    "Number of tokens per step."
    lr: float = 3e-3
    "Peak learning rate, which decays to zero along a cosine."
    weight_decay: float = 0.01
    "AdamW's weight decay."
    hidden: int | None = None
    "Number of hidden units (default: the model's width, at most LARGEST_HIDDEN)."
    seed: int = 0
    "Seed of the parameters and of the order of the tokens."

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr: expected a number above 0, got {self.lr}")
        for name in ("weight_decay", "seed"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: expected at least 0, got {value}")


def fit_gate(
    kind: str,
    states: Float[Tensor, "N D"],
    targets: Float[Tensor, "N K"],
    config: GateConfig | None = None,
) -> Gate:
    """Fit a gate to states of any precision. The result is deterministic for a seed.

    For ``gate``, ``targets`` are 1 if the last layer predicts the same token, else 0. For
    ``gain``, they are KL(p_L || p) in nats at this exit and at each later one but the last.
    Raises ConfigError if there are no states or a target is not finite.
    """
    config = config or GateConfig()
    if kind not in GATE_KINDS:
        raise ConfigError(f"gate: expected one of {', '.join(GATE_KINDS)}, got {kind!r}")
    if not (len(states) and torch.isfinite(targets).all()):
        raise ConfigError("gate: expected states with finite targets, got none or other targets")
    size, outputs = states.shape[1], targets.shape[1]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(config.seed)
        gate = Gate(size, outputs=outputs, hidden=config.hidden).to(states.device)
        loss_of = _balanced_logistic(targets) if kind == "gate" else _mean_loss
        optimizer = torch.optim.AdamW(
            gate.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        for step in range(config.steps):
            rate = 0.5 * config.lr * (1 + math.cos(math.pi * step / config.steps))
            optimizer.param_groups[0]["lr"] = rate
            rows = torch.randint(len(states), (config.batch_size,)).to(states.device)
            loss = loss_of(gate(states[rows].float()), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return gate.eval().requires_grad_(False)


def _balanced_logistic(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a cross-entropy in which both classes have the same total weight."""
    agree = targets.mean().clamp(1e-6, 1 - 1e-6)

    def loss(out: Tensor, target: Tensor) -> Tensor:
        weight = torch.where(target > 0.5, 0.5 / agree, 0.5 / (1 - agree))
        return F.binary_cross_entropy_with_logits(out, target, weight=weight)

    return loss


def _mean_loss(out: Tensor, target: Tensor) -> Tensor:
    """Return the mean of m - y ln m, a quasi-likelihood whose variance is the mean.

    Its minimum is at the mean of y for any distribution of y, and a few large y have less
    influence than in a squared error.
    """
    mean = expected_kl(out).clamp(min=1e-6)
    return (mean - target * mean.log()).mean()
