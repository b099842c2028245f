"""Time decoding with confident exits against full depth, for several widths of the model.

    python benchmarks/exit_by_width.py [WIDTH ...]

Native decoders of 6 layers with an exit after 2 (123 characters, heads of 32, greedy, one row of
200 new tokens behind 40), at the threshold where 65% of the layers run under ``propagate``. The
parameters are random, because the time does not depend on their values. Prints the medians of 15
interleaved runs, and the speedup if only layers took time: 6 / mean layers.
"""

import sys
import time
from statistics import median

from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.training.loop import new_model

WIDTHS, SHARE, ROUNDS, NEW = (128, 256, 512, 768), 0.65, 15, 200
PROMPT = list(range(40))


def run(model: Transformer, threshold: float | None) -> tuple[float, float]:
    """Return (seconds, mean layers) of one text."""
    config = GenerateConfig(max_new_tokens=NEW, threshold=threshold)
    start = time.perf_counter()
    generation = generate(model, PROMPT, config)
    for _ in generation:
        pass
    return time.perf_counter() - start, generation.mean_layers


def threshold_at(model: Transformer, share: float) -> float:
    """Return the largest threshold at which at most this share of the layers runs."""
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        if run(model, middle)[1] > share * model.num_layers:
            high = middle
        else:
            low = middle
    return low


def main() -> None:
    """Print one line for each width."""
    for width in [int(given) for given in sys.argv[1:]] or WIDTHS:
        config = DecoderConfig(
            vocab_size=123,
            hidden_size=width,
            num_attention_heads=width // 32,
            exit_layers=(2,),
            exit_head="norm",
        )
        model = new_model(config, seed=0).eval()
        threshold = threshold_at(model, SHARE)
        layers = run(model, threshold)[1]
        rounds = [(run(model, None)[0], run(model, threshold)[0]) for _ in range(ROUNDS)]
        full, exit = (median(column) for column in zip(*rounds, strict=True))
        print(
            f"width {width}: full {NEW / full:.0f} tokens/s, exit:propagate {NEW / exit:.0f} at "
            f"{layers:.2f} layers: {full / exit:.2f} times full (layers alone: "
            f"{model.num_layers / layers:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
