"""Time a sweep of 100 thresholds against a sweep of one, with the same text and model.

    python benchmarks/sweep_thresholds.py [--corpus python-docs]

Each time includes one pass of the model over the text and the array operations after it. The two
sweeps are timed alternately.
"""

import argparse
import statistics
import time

import numpy as np

from offramp.data import batches, character_tokenizer, encode, load_corpus
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import collect_trace
from offramp.models.native.config import DecoderConfig
from offramp.training.loop import new_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default="python-docs")
    parser.add_argument("--characters", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    text = load_corpus(arguments.corpus).whole[: arguments.characters]
    tokenizer = character_tokenizer(text)
    ids = encode(tokenizer, text)
    config = DecoderConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        norm="post",
    )
    model = new_model(config, seed=0).eval()
    counts = {1: [0.05], 100: np.linspace(0.0, 1.0, 100).tolist()}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for repeat in range(arguments.repeats + 1):
        for count, thresholds in counts.items():
            start = time.perf_counter()
            trace = collect_trace(model, batches(ids, seq_len=64, batch_size=32))
            sweep(trace, thresholds)
            if repeat:  # the first is a warm-up
                seconds[count].append(time.perf_counter() - start)
    medians = {count: statistics.median(values) for count, values in seconds.items()}
    for count, median in medians.items():
        print(f"{count:4} thresholds {median * 1e3:8.1f} ms for {len(ids):,} characters")
    print(f"100 / 1 {medians[100] / medians[1]:.3f}")


if __name__ == "__main__":
    main()
