"""Time one training step: offramp against a plain eager implementation, interleaved in one run.

The plain side is a direct implementation of the seed document: explicit softmax attention with a
mask, RMSNorm and rotary positions as separate operations, logits at every layer, and cross-entropy
at the layers with a weight. Both sides have the same parameters and batch and do the same work:
forward, backward, gradient clip, AdamW. Their losses are compared first.

    python benchmarks/train_step.py            # the two models of the project's own targets
    python benchmarks/train_step.py --repeats 15 --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.training.config import TrainConfig
from offramp.training.exit_loss import ExitLoss
from offramp.training.loop import new_model

MODELS = {
    "seed (dim 64, 3 layers, vocabulary 30, batch 32 x 64)": (
        DecoderConfig(
            vocab_size=30,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            norm="post",
        ),
        (32, 64),
        {1: 0.7, 3: 0.3},
    ),
    "dim 256, 12 layers, vocabulary 8,192, batch 8 x 256": (
        DecoderConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=12,
            num_attention_heads=4,
        ),
        (8, 256),
        {1: 0.7, 12: 0.3},
    ),
}


class PlainNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class PlainAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        size = dim // self.heads

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, size).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        inverse = 1.0 / (10_000 ** (torch.arange(0, size, 2).float() / size))
        angles = torch.outer(torch.arange(length).float(), inverse)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()

        def rotate(y: Tensor) -> Tensor:
            first, second = y[..., : size // 2], y[..., size // 2 :]
            return y * cos + torch.cat((-second, first), dim=-1) * sin

        scores = rotate(q) @ rotate(k).transpose(-2, -1) / size**0.5
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        weights = F.softmax(scores.masked_fill(mask, float("-inf")), dim=-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, length, dim))


class PlainBlock(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self.post = config.norm == "post"
        self.norm1, self.norm2 = PlainNorm(dim), PlainNorm(dim)
        self.attention = PlainAttention(dim, config.num_attention_heads)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainModel(nn.Module):
    """The plain side, with the parameters of an offramp model."""

    def __init__(self, source: Transformer) -> None:
        super().__init__()
        config = source.config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = PlainNorm(config.hidden_size) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        mine = list(self.parameters())
        post = config.norm == "post"
        theirs = [source.model.embed_tokens.weight]
        for block in source.model.layers:
            attention, mlp = block.self_attn, block.mlp
            norms = (
                (block.post_attention_layernorm, block.post_feedforward_layernorm)
                if post
                else (block.input_layernorm, block.post_attention_layernorm)
            )
            theirs += [norm.weight for norm in norms]
            theirs += [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            theirs += [attention.o_proj.weight]
            theirs += [p.weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        theirs += [] if post else [source.model.norm.weight]
        theirs += [source.lm_head.weight]
        with torch.no_grad():
            for own, other in zip(mine, theirs, strict=True):
                own.copy_(other)

    def forward_all_layers(self, input_ids: Tensor) -> list[Tensor]:
        h = self.embedding(input_ids)
        logits = []
        for block in self.blocks:
            h = block(h)
            logits.append(self.head(self.norm(h)))
        return logits


def plain_side(
    source: Transformer, inputs: Tensor, targets: Tensor, weights: dict[int, float]
) -> Callable[[], float]:
    model = PlainModel(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        logits = model.forward_all_layers(inputs)
        losses = {
            layer: F.cross_entropy(logits[layer - 1].flatten(0, 1), targets.flatten())
            for layer in weights
        }
        loss = sum(weight * losses[layer] for layer, weight in weights.items())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def offramp_side(
    model: Transformer,
    inputs: Tensor,
    targets: Tensor,
    weights: dict[int, float],
    precision: str = "float32",
    *,
    compiled: bool = False,
) -> Callable[[], float]:
    written = ",".join(f"{layer}={weight}" for layer, weight in weights.items())
    config = TrainConfig(loss_weights=written, precision=precision)
    if compiled:
        for block in model.block_modules:
            block.compile()
    exit_loss = ExitLoss(model, config, total_steps=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        loss, _ = exit_loss(inputs, targets, step=1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Return the median seconds per step of each side; the sides are timed alternately."""
    for step in sides.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="counted steps of each side")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, (config, shape, weights) in MODELS.items():
        torch.manual_seed(0)
        inputs = torch.randint(0, config.vocab_size, shape)
        targets = torch.randint(0, config.vocab_size, shape)
        source = new_model(config, seed=0)
        only_final = {config.num_hidden_layers: 1.0}
        sides = {"plain": plain_side(source, inputs, targets, weights)}
        for precision in ("float32", "bfloat16"):
            for compiled in (False, True):
                words = f"{precision}{', compiled' if compiled else ''}"
                for kind, chosen in (("final only", only_final), ("offramp", weights)):
                    model = (
                        source
                        if (kind, words) == ("offramp", "float32")
                        else new_model(config, seed=0)
                    )
                    sides[f"{kind}, {words}"] = offramp_side(
                        model, inputs, targets, chosen, precision, compiled=compiled
                    )
        plain_loss, own_loss = sides["plain"](), sides["offramp, float32"]()
        assert abs(plain_loss - own_loss) < 1e-4, (plain_loss, own_loss)
        seconds = measure(sides, arguments.repeats)
        print(f"\n{name}\n  {'plain':30} {seconds['plain'] * 1e3:8.1f} ms a step")
        for side, median in seconds.items():
            if side.startswith("offramp"):
                final = seconds[side.replace("offramp", "final only")]
                print(
                    f"  {side:30} {median * 1e3:8.1f} ms a step; plain / this "
                    f"{seconds['plain'] / median:.2f}; this / final loss only {median / final:.2f}"
                )


if __name__ == "__main__":
    main()
