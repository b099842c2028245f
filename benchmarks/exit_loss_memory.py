"""Measure peak memory and time of four exits' losses over a large vocabulary, plain and chunked.

    python benchmarks/exit_loss_memory.py

Four exits with one head, vocabulary 49,152, 2,048 tokens, float32: forward and backward of only
the loss. Each side runs in a separate process, because the peak is that of a process. The memory
does not include the states, the head and the inputs of its gradient.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from offramp.exits.loss import weighted_exit_loss

VOCABULARY, WIDTH, TOKENS = 49_152, 576, 2_048
WEIGHTS = {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_side(side: str, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    states = {layer: torch.randn(1, TOKENS, WIDTH, requires_grad=True) for layer in WEIGHTS}
    targets = torch.randint(VOCABULARY, (1, TOKENS))
    head.weight.grad = torch.zeros_like(head.weight)
    before, seconds = peak_mb(), []
    for _ in range(repeats):
        start = time.perf_counter()
        if side == "plain":
            logits = {layer: head(h) for layer, h in states.items()}
            loss = sum(
                weight * F.cross_entropy(logits[layer].flatten(0, 1), targets.flatten())
                for layer, weight in WEIGHTS.items()
            )
            del logits
        else:
            loss, _ = weighted_exit_loss(
                states,
                lambda h, layer: head(h),
                targets,
                WEIGHTS,
                [head.weight],
                vocab_size=VOCABULARY,
            )
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return {"mb": peak_mb() - before, "seconds": statistics.median(seconds), "loss": float(loss)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=("plain", "chunks"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(one_side(arguments.side, arguments.repeats)))
        return
    figures = {}
    for side in ("plain", "chunks"):
        command = [sys.executable, __file__, "--side", side, "--repeats", str(arguments.repeats)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures[side] = json.loads(done.stdout)
        print(
            f"{side:7} {figures[side]['mb']:7.0f} MB above the model's, "
            f"{figures[side]['seconds']:6.2f} s a step, loss {figures[side]['loss']:.5f}"
        )
    for name, unit in (("memory", "mb"), ("time", "seconds")):
        print(f"chunks / plain, {name:6} {figures['chunks'][unit] / figures['plain'][unit]:.2f}")


if __name__ == "__main__":
    main()
