"""Time calibration against the model pass that it needs, interleaved in one run.

The pass runs every block over the text and computes the logits of 3 exits. Calibration does the
same, records a trace, and makes a certificate with 20 thresholds (sequence losses, p-values,
expected cost).

    python benchmarks/calibrate_pass.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from offramp.calibration.certify import certify
from offramp.calibration.promise import Promise
from offramp.calibration.risk import threshold_path
from offramp.data import batches
from offramp.evaluation.trace import collect_trace
from offramp.models.base import whole_step
from offramp.models.native.config import DecoderConfig
from offramp.training.loop import new_model

MODELS = {
    "dim 128, 6 layers, vocabulary 123": DecoderConfig(
        vocab_size=123, hidden_size=128, num_hidden_layers=6, exit_layers=(2, 4)
    ),
    "dim 256, 12 layers, vocabulary 8,192": DecoderConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=12, exit_layers=(4, 8)
    ),
}
TOKENS, SEQ_LEN, BATCH = 16_384, 128, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, config in MODELS.items():
        model = new_model(config, seed=0).eval()
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (TOKENS + 1,), generator=random)
        path = threshold_path("max_prob", len(model.exit_layers), steps=20)

        @torch.inference_mode()
        def one_pass(model=model, ids=ids) -> None:  # type: ignore[no-untyped-def]
            for inputs, _ in batches(ids, seq_len=SEQ_LEN, batch_size=BATCH):
                states = model.states_at(inputs, model.exit_layers, step=whole_step(inputs))
                for layer, h in states:
                    model.unembed(h, layer)

        def calibrate(model=model, ids=ids, path=path) -> None:  # type: ignore[no-untyped-def]
            trace = collect_trace(model, batches(ids, seq_len=SEQ_LEN, batch_size=BATCH))
            certify(trace, Promise(), model_sha256="", corpus_sha256="", path=path)

        times = interleaved([one_pass, calibrate], arguments.repeats)
        seconds = [statistics.median(found) for found in times]
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        print(
            f"{name}: pass {seconds[0]:.2f} s, calibration with it {seconds[1]:.2f} s: "
            f"{ratio:.3f} of the pass (median of {arguments.repeats} pairs)"
        )


def interleaved(functions: list[Callable[[], None]], repeats: int) -> list[list[float]]:
    """Return the seconds that each function took; the first round does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(repeats + 1):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if round_:
                times[index].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
