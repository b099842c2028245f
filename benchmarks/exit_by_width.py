"""Time decoding with confident exits against full depth, for several widths of the model.

    python benchmarks/exit_by_width.py [WIDTH ...]

Native decoders of 6 layers with an exit after 2 (123 characters, heads of 32, greedy, one row of
200 new tokens behind 40), at the threshold where 65% of the layers run under ``propagate``, by
``gain`` and by ``max_prob``. The parameters of model and gates are random, because the time does
not depend on their values. Prints the medians of 15 interleaved runs, the speedup if only layers
took time (6 / mean layers), and the microseconds of a token at full depth that are not spent in
the compiled kernels.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from offramp.exits.gate import FittedExits, Gate
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.models.native.fast import router
from offramp.training.loop import new_model

WIDTHS, SHARE, ROUNDS, NEW = (128, 256, 512, 768), 0.65, 15, 200
PROMPT = list(range(40))
RANGES = {"gain": (-5.0, 0.0), "max_prob": (0.0, 1.0)}


def run(
    model: Transformer, fitted: FittedExits, threshold: float | None, confidence: str = "max_prob"
) -> tuple[float, float]:
    """Return (seconds after the first token, mean layers) of one text."""
    config = GenerateConfig(max_new_tokens=NEW, threshold=threshold, confidence=confidence)
    generation = generate(model, PROMPT, config, fitted=fitted)
    next(generation)
    start = time.perf_counter()
    for _ in generation:
        pass
    return time.perf_counter() - start, generation.mean_layers


def threshold_at(model: Transformer, fitted: FittedExits, share: float, confidence: str) -> float:
    """Return the largest threshold at which at most this share of the layers runs."""
    low, high = RANGES[confidence]
    for _ in range(18):
        middle = (low + high) / 2
        if run(model, fitted, middle, confidence)[1] > share * model.num_layers:
            high = middle
        else:
            low = middle
    return low


@contextmanager
def kernel_seconds() -> Iterator[list[float]]:
    """Yield a list that gets the seconds of each call of the kernels that routes a token."""
    kernels, found = router._few_tokens, []

    class Timed:
        @staticmethod
        def route(*arguments: object) -> object:
            start = time.perf_counter()
            routed = kernels.route(*arguments)
            found.append(time.perf_counter() - start)
            return routed

    router._few_tokens = Timed
    try:
        yield found
    finally:
        router._few_tokens = kernels


def python_share(model: Transformer, fitted: FittedExits) -> float:
    """Return the microseconds of a token at full depth outside the kernels (median of 5 texts)."""
    found = []
    for _ in range(5):
        with kernel_seconds() as inside:
            seconds, _ = run(model, fitted, None)
        found.append(1e6 * (seconds - sum(inside)) / (NEW - 1))
    return median(found)


def main() -> None:
    """Print a line for each width and confidence."""
    for width in [int(given) for given in sys.argv[1:]] or WIDTHS:
        config = DecoderConfig(
            vocab_size=123,
            hidden_size=width,
            num_attention_heads=width // 32,
            exit_layers=(2,),
            exit_head="norm",
        )
        model = new_model(config, seed=0).eval()
        torch.manual_seed(0)
        gate = Gate(width).eval().requires_grad_(False)
        fitted = FittedExits(gates={"gain": {2: gate}})
        at = {name: threshold_at(model, fitted, SHARE, name) for name in RANGES}
        rounds = [
            (
                run(model, fitted, None)[0],
                *(run(model, fitted, bound, name)[0] for name, bound in at.items()),
            )
            for _ in range(ROUNDS)
        ]
        full, *exits = zip(*rounds, strict=True)
        print(
            f"width {width}: full {(NEW - 1) / median(full):.0f} tokens/s, of a token "
            f"{python_share(model, fitted):.0f} microseconds outside the kernels",
            flush=True,
        )
        for (name, bound), seconds in zip(at.items(), exits, strict=True):
            layers = run(model, fitted, bound, name)[1]
            ratio = median(f / s for f, s in zip(full, seconds, strict=True))
            print(
                f"  exit:propagate by {name}: {(NEW - 1) / median(seconds):.0f} tokens/s at "
                f"{layers:.2f} layers: {ratio:.2f} times full (layers alone: "
                f"{model.num_layers / layers:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
