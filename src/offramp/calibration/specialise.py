"""Specialised exits: each learns from the tokens that exit there, the backbone frozen.

An exit that is trained on every token spends much of its capacity on hard tokens, which continue
to the last layer anyway. Gates choose which tokens exit where at a compute budget; then the last
layer teaches those tokens to the exit's own parameters (norm, residual block, LM head; Hinton et
al. 2015). The gates were fitted to the exits as they were before; fit them again afterwards.
Full-depth output is unchanged.

Exits can also be added here: the backbone then learned nothing for them, and full depth loses
nothing to them.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from offramp.calibration.fitting import fit_gates
from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.errors import ConfigError, TrainingError
from offramp.evaluation.cost import model_cost
from offramp.evaluation.sample import ExitSample, collect_sample, first_tokens
from offramp.exits.gate import FittedExits, Gate, GateConfig, expected_kl
from offramp.exits.policy import GainPolicy
from offramp.models.base import TrainableModel, require_blocks
from offramp.models.exit_heads import ExitHead

M = TypeVar("M", bound=TrainableModel)

_ROUNDS = 40
_AT_ONCE = 8192  # tokens


def with_own_heads(model: M, *, seed: int, add: Collection[int] = ()) -> M:
    """Return the model with exit heads of its own that give the current logits.

    Exits with an adapter or their own LM head keep them, others get heads of kind ``specialist``.
    Exits at the layers ``add`` are new, with heads of the same kind. If nothing is new, the model
    itself is returned.

    ``seed`` is for the inputs of the new residual blocks, whose outputs begin at zero. Raises
    ConfigError if a layer to add is not between 1 and L - 1 or has an exit already, or if the
    exits share a final norm that the model does not have.
    """
    for layer in add:
        if not 1 <= layer < model.num_layers or layer in model.exit_layers:
            exits = ", ".join(map(str, model.exit_layers[:-1])) or "none"
            raise ConfigError(
                f"add_exits: expected layers from 1 to {model.num_layers - 1} without an exit "
                f"(there are exits at: {exits}), got {layer}"
            )
    kind = "specialist" if model.exit_head in ("shared", "norm") else model.exit_head
    if kind == model.exit_head and not add:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(M, model.with_exits((*model.exit_layers, *add), kind))


def specialise_exits(
    model: TrainableModel,
    batches: Iterable[tuple[Int[Tensor, "B S"], Int[Tensor, "B T"]]],
    config: SpecialiseConfig,
) -> dict[int, float]:
    """Train each exit's own parameters, in place, on the tokens that exit there.

    ``batches`` are of training text, in a random order. The exits to add are there already
    (``with_own_heads``); all exits then first learn from all tokens. Returns the share of the
    tokens that exited at each exit at the budget. Raises ConfigError if an exit has no parameters
    of its own, if the budget is less than the cost of the first exit, or if the blocks cannot be
    run one by one (their cost is then unknown). Raises TrainingError if the loss is not finite.
    """
    check_heads(model)
    model.silence_untrained()  # the exits are about to be trained
    batches = list(first_tokens(batches, config.tokens))
    sample = collect_sample(model, iter(batches), max_tokens=config.tokens)
    assert sample.trace.position is not None
    check_specialise(model, config, context=float(sample.trace.position.mean()) + 1)
    early = model.exit_layers[:-1]
    if config.add_exits:
        every = torch.ones(sample.trace.num_tokens)
        for layer in early:
            _teach(model, layer, sample, every, config, steps=config.first_steps)
        sample = collect_sample(model, iter(batches), max_tokens=config.tokens)
    leaving = _leaving_tokens(model, sample, config)
    for index, layer in enumerate(early):
        if not leaving[index].any():
            continue  # no token exits here
        weights = torch.from_numpy(np.where(leaving[index], 1.0, config.others)).float()
        _teach(model, layer, sample, weights, config, steps=config.steps)
    model.exits.trained = True
    return {layer: float(leaving[index].mean()) for index, layer in enumerate(model.exit_layers)}


def check_heads(model: TrainableModel) -> None:
    """Raise a ConfigError unless the exits have parameters of their own and a known cost."""
    require_blocks(model, "specialise")
    early = model.exit_layers[:-1]
    missing = [layer for layer in early if str(layer) not in model.exits]
    if missing or not early:
        raise ConfigError(
            "exit_head: expected early exits with parameters of their own, got "
            f"{f'none at layer {missing[0]}' if early else 'none'}"
        )


def check_specialise(model: TrainableModel, config: SpecialiseConfig, *, context: float) -> None:
    """Raise the ConfigErrors of ``specialise_exits``, for windows of a mean ``context`` in keys."""
    least = least_budget(model, config, context=context)
    if config.compute_budget < least:
        raise too_low(config.compute_budget, least, model.exit_layers[0])


def least_budget(model: TrainableModel, config: SpecialiseConfig, *, context: float) -> float:
    """Return the FLOPs% of leaving at the first exit: no budget can be less."""
    check_heads(model)
    early = model.exit_layers[:-1]
    gates = {layer: Gate(model.hidden_size, outputs=1).to(model.device) for layer in early}
    return _costs(model, gates, context, config.missing_kv)[0]


def too_low(budget: float, least: float, layer: int) -> ConfigError:
    """Return the error of a budget below ``least``, the cost of leaving at ``layer``."""
    return ConfigError(
        f"compute_budget: expected at least {math.ceil(10 * least) / 10:g}, the cost of leaving at "
        f"layer {layer} with a gate and an exit head, got {budget:g}"
    )


def _costs(
    model: TrainableModel, gates: Mapping[int, Gate], context: float, missing_kv: str
) -> tuple[float, ...]:
    """Return the FLOPs% of leaving at each exit with ``gain`` gates."""
    cost = model_cost(model, context=context, fitted=FittedExits(gates={"gain": gates}))
    return cost.flops_pct_by_exit("gain", missing_kv=missing_kv)


def _leaving_tokens(
    model: TrainableModel, sample: ExitSample, config: SpecialiseConfig
) -> Bool[NDArray[np.bool_], "E N"]:
    """Return which tokens leave at each exit by ``gain`` gates, at a mean cost of the budget."""
    gates = fit_gates("gain", sample, GateConfig(seed=config.seed))
    assert sample.trace.position is not None
    context = float(sample.trace.position.mean()) + 1
    costs = _costs(model, gates, context, config.missing_kv)
    expected = [_expected(gates[layer], sample.states[layer]) for layer in model.exit_layers[:-1]]
    cheap, dear = 1e-9, 10.0  # prices in nats for one percent of FLOPs
    for _ in range(_ROUNDS):
        price = math.sqrt(cheap * dear)
        leaving = GainPolicy(price=price, costs=costs).leaving(expected)
        if np.dot(leaving.mean(axis=1), costs) > config.compute_budget:
            cheap = price
        else:
            dear = price
    return GainPolicy(price=dear, costs=costs).leaving(expected)


@torch.no_grad()
def _expected(gate: Gate, states: Float[Tensor, "N D"]) -> Float[NDArray[np.float32], "K N"]:
    parts = [expected_kl(gate(h.float())) for h in states.split(_AT_ONCE)]
    return torch.cat(parts).T.contiguous().numpy()


def _teach(
    model: TrainableModel,
    layer: int,
    sample: ExitSample,
    weights: Float[Tensor, " N"],
    config: SpecialiseConfig,
    *,
    steps: int,
) -> None:
    """Train the head of one exit with a weight for each token of the sample."""
    targets = torch.from_numpy(sample.trace.targets)
    parameters = list(cast(ExitHead, model.exits[str(layer)]).parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    norms = [parameter for parameter in parameters if parameter.ndim < 2]  # they do not decay
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    order = torch.Generator().manual_seed(config.seed)
    last = model.num_layers

    def log_probs(at: int, rows: Tensor) -> Tensor:
        h = sample.states[at][rows].to(model.device, sample.dtype)
        return F.log_softmax(model.unembed(h[None], at)[0].float(), dim=-1)

    for step in range(steps):
        rate = 0.5 * config.lr * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(targets), (config.batch_size,), generator=order)
        weight = weights[rows].to(model.device)
        with torch.no_grad():
            teacher = log_probs(last, rows)
        with torch.enable_grad():
            student = log_probs(layer, rows)
            loss = (1 - config.imitate) * F.nll_loss(
                student, targets[rows].to(model.device), reduction="none"
            ) + config.imitate * (teacher.exp() * (teacher - student)).sum(dim=-1)
            mean = (weight * loss).sum() / weight.sum().clamp(min=1e-6)
        if not torch.isfinite(mean):
            raise TrainingError(f"step {step + 1}: expected a finite loss, got {float(mean)}")
        grads = torch.autograd.grad(mean, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
