"""Time a training step of the reproduction seed by seed, and with the seeds stacked.

    python benchmarks/stacked_seeds.py
    python benchmarks/stacked_seeds.py --stacks 2 16 --repeats 9

Stacked: the parameters of several seeds get a leading dimension, and ``torch.vmap`` over the real
model turns every product into one batched product of all seeds. Both ways have one thread, the
same batch and the same work: forward, backward, gradient clip, AdamW. Their gradients are first
compared in float64. The ways are timed alternately; the times are processor time.

The script then says where the time of a step goes. Stacking can only save the fixed cost of a
call, which is the time of the same step on a batch of one window of 64 tokens instead of 32.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.profiler import ProfilerActivity, profile

from offramp.data import character_tokenizer, encode, load_corpus, vocabulary_size
from offramp.models.base import whole_step
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.studies.reproduce.methods import ALPHA_07
from offramp.studies.reproduce.study import seed_model, seed_training
from offramp.training.config import TrainConfig
from offramp.training.exit_loss import ExitLoss
from offramp.training.loop import TrainingRun, new_model

WEIGHTS = {1: 0.7, 3: 0.3}
KINDS = {
    "matrix products": ("mm", "bmm", "addmm"),
    "attention": ("_scaled_dot_product",),
    "the loss": ("_ChunkedLoss", "softmax", "amax", "gather"),
    "the optimizer": ("_fused_adamw_", "_foreach"),
    "element by element, and copies": (
        *("mul", "add", "div", "pow", "silu", "rsqrt", "mean", "sum", "cat"),
        *("copy_", "neg", "fill_", "sub", "sigmoid"),
    ),
}


class StackedLoss(nn.Module):
    """The weighted loss of one seed, in operations that ``torch.vmap`` can batch."""

    def __init__(self, model: Transformer, inputs: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.model, self.inputs, self.targets = model, inputs, targets

    def forward(self) -> Tensor:
        states = self.model.states_at(self.inputs, WEIGHTS, step=whole_step(self.inputs))
        losses = [
            weight * F.cross_entropy(self.model.unembed(h, layer).flatten(0, 1), self.targets)
            for (layer, h), weight in zip(states, WEIGHTS.values(), strict=True)
        ]
        return torch.stack(losses).sum()


def stacked(
    models: list[Transformer], ids: Tensor
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """A step of all models at once, and their stacked parameters by name."""
    inputs, targets = ids[:2048].view(32, 64), ids[1:2049]
    module = StackedLoss(models[0], inputs, targets)
    parameters, buffers = stack_module_state(models)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, fused=True)

    def of_one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        held = {**parameters, **buffers}
        named = {f"model.{name}": value for name, value in held.items()}
        loss: Tensor = functional_call(module, named)
        return loss

    losses = torch.vmap(of_one)

    def step(update: bool = True) -> Tensor:
        loss = losses(parameters, buffers)
        loss.sum().backward()
        if update:
            norms = [each.grad.flatten(1).norm(dim=1) for each in parameters.values()]
            shrink = (1.0 / (torch.stack(norms).norm(dim=0) + 1e-6)).clamp(max=1.0)
            for each in parameters.values():
                each.grad.mul_(shrink.view(-1, *[1] * (each.dim() - 1)))
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return step, parameters


def compare(config: DecoderConfig, training: TrainConfig, ids: Tensor) -> float:
    """The largest difference of a gradient in float64, stacked against one by one."""
    models = [new_model(config, seed=seed).double() for seed in range(3)]
    step, parameters = stacked(models, ids)
    step(update=False)
    largest = 0.0
    for seed, model in enumerate(models):
        module = ExitLoss(model, training, total_steps=1)
        loss, _ = module(ids[:2048].view(32, 64), ids[1:2049].view(32, 64), step=1)
        loss.backward()
        for name, parameter in model.named_parameters():
            gap = (parameters[name].grad[seed] - parameter.grad).abs().max()
            largest = max(largest, float(gap))
    return largest


def single(config: DecoderConfig, training: TrainConfig, ids: Tensor) -> Callable[[], object]:
    run = TrainingRun(new_model(config, seed=0), ids, ids[:2049], training)
    run.resume()
    return run.step


def kind_of(name: str) -> str:
    bare = name.removeprefix("aten::")
    for kind, names in KINDS.items():
        if any(bare == each or (each.startswith("_") and bare.startswith(each)) for each in names):
            return kind
        if any(bare.startswith(each) for each in names if len(each) > 2):
            return kind
    return "the rest: autograd, views, Python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "There is a performance drop")  # one attention per seed
    text = load_corpus("pangram").train[:100_000]
    tokenizer = character_tokenizer(text)
    ids = encode(tokenizer, text)
    config = replace(seed_model(ALPHA_07), vocab_size=vocabulary_size(tokenizer))
    training = seed_training(ALPHA_07, seed=0, epochs=50)
    print(f"largest difference of a gradient in float64: {compare(config, training, ids):.1e}")

    ways: dict[str, tuple[Callable[[], object], int]] = {
        "one by one": (single(config, training, ids), 1)
    }
    for count in arguments.stacks:
        models = [new_model(config, seed=seed) for seed in range(count)]
        ways[f"{count} stacked"] = (stacked(models, ids)[0], count)
    few = replace(training, batch_size=1)
    ways["one by one, 1 window (fixed cost)"] = (single(config, few, ids), 1)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for step, _ in ways.values():
        step()
    for _ in range(arguments.repeats):
        for name, (step, count) in ways.items():
            step()  # the caches are those of the way before
            start = time.process_time()
            step()
            taken[name].append((time.process_time() - start) / count)
    base = taken["one by one"]
    for name, values in taken.items():
        speed = statistics.median(one / own for one, own in zip(base, values, strict=True))
        milliseconds = 1000 * statistics.median(values)
        print(f"{name:34} {milliseconds:6.1f} ms a seed and step, {speed:5.2f} times as fast")

    step, _ = ways["one by one"]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(arguments.repeats):
            step()
    shares: dict[str, float] = {}
    for event in profiled.key_averages():
        kind = kind_of(event.key)
        shares[kind] = shares.get(kind, 0.0) + event.self_cpu_time_total
    for kind, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        print(f"{100 * share / sum(shares.values()):5.1f}% {kind}")


if __name__ == "__main__":
    main()
