"""Prints how far losses and gradients of compiled blocks are from those of the same blocks as they
are, for a model whose upper blocks share keys and values: ``python compiled.py [BACKEND]``.
"""

import json
import sys

import torch

from offramp.models.native.config import DecoderConfig
from offramp.training.config import TrainConfig
from offramp.training.exit_loss import ExitLoss
from offramp.training.loop import new_model

OPTIONS = {
    "plain": {},
    "dropout": {"layer_dropout": 0.7},
    "recompute": {"recompute_activations": True},
}


def step_of(model, text, fields):
    model.zero_grad()
    config = TrainConfig(loss_weights="1=0.2,2=0.3,5=0.5", batch_size=4, **fields)
    loss, _ = ExitLoss(model, config, total_steps=9)(text[:, :-1], text[:, 1:], step=5)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def main(backend="aot_eager"):
    gaps = {}
    text = torch.arange(36).view(4, 9) ** 2 % 13
    for norm in ("pre", "post"):
        shape = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 5, "norm": norm}
        config = DecoderConfig(
            **shape, num_key_value_heads=2, exit_layers=(1, 2), kv_source_layer=2
        )
        for name, fields in OPTIONS.items():
            model = new_model(config, seed=0)
            expected = [found.clone() for found in step_of(model, text, fields)]
            torch.compiler.reset()
            for block in model.block_modules:
                block.compile(backend=backend)
            found = step_of(model, text, fields)
            gaps[f"{norm} {name}"] = max(
                float((one - other).abs().max()) for one, other in zip(found, expected, strict=True)
            )
    print(json.dumps(gaps))


if __name__ == "__main__":
    main(*sys.argv[1:])
