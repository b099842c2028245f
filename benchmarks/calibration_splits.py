"""Test whether certificates hold on new text, and compare gates with max_prob at equal FLOPs.

The model is traced once on the text of --test. Then the sequences are divided at random into two
halves, 20 times: thresholds are certified on one half, and the risk is measured on the other.
After that, the PPL at equal FLOPs (heads and gates counted) is printed for max_prob, gate and
gain, with gates that are fitted on --train. Figures are under missing_kv="recompute".

    python benchmarks/calibration_splits.py MODEL --train valid.txt --test test.txt
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from offramp.calibration.budget import keep_budget
from offramp.calibration.certify import certify
from offramp.calibration.fitting import fit_exits
from offramp.calibration.promise import Promise
from offramp.calibration.risk import sequence_losses, whole_sequences
from offramp.data import batches, encode
from offramp.evaluation.cost import model_cost
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import ExitTrace, collect_trace
from offramp.models.open import open_model

MEASURES = ("max_prob", "gate", "gain")
EPSILONS = (0.02, 0.05, 0.10)
BUDGETS = (95, 90, 85, 80, 75, 70, 65, 60, 55, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--train-tokens", type=int, default=131_072)
    parser.add_argument("--test-tokens", type=int, default=131_072)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--delta", type=float, default=0.05)
    arguments = parser.parse_args()
    opened = open_model(arguments.model)
    model, tokenizer = opened.model, opened.tokenizer
    train_ids, test_ids = (
        encode(tokenizer, path.read_text(encoding="utf-8"))[: limit + 1]
        for path, limit in (
            (arguments.train, arguments.train_tokens),
            (arguments.test, arguments.test_tokens),
        )
    )

    def windows(ids, order=None):  # type: ignore[no-untyped-def]
        return batches(ids, seq_len=arguments.seq_len, batch_size=8, order=order)

    start = time.perf_counter()
    fitted = fit_exits(model, windows(train_ids, torch.Generator().manual_seed(0)))
    print(f"gates fitted on {len(train_ids) - 1:,} tokens in {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    trace = whole_sequences(
        collect_trace(model, windows(test_ids), measures=MEASURES, fitted=fitted)
    )
    print(f"trace of {trace.num_tokens:,} tokens in {time.perf_counter() - start:.0f} s")
    cost = model_cost(model, context=(arguments.seq_len + 1) / 2, fitted=fitted)
    for measure in MEASURES:
        for epsilon in EPSILONS:
            promise = Promise(epsilon=epsilon, delta=arguments.delta)
            print(splits(trace, measure, promise, cost, arguments.splits))
    frontier(trace, cost)


def splits(trace: ExitTrace, measure: str, promise: Promise, cost, count: int) -> str:  # type: ignore[no-untyped-def]
    held, risks, compute, flops, n = 0, [], [], [], 0
    sequences = np.unique(trace.sequence)
    for split in range(count):
        order = np.random.default_rng(split).permutation(sequences)
        halves = [trace.tokens(np.isin(trace.sequence, part)) for part in np.array_split(order, 2)]
        certificate = certify(
            halves[0], promise, model_sha256="", corpus_sha256="", confidence=measure, cost=cost
        )
        n = certificate.n
        losses = sequence_losses(
            halves[1], (certificate.thresholds,), confidence=measure, risk=promise.risk
        )
        risks.append(losses.mean())
        held += risks[-1] <= promise.epsilon
        [row] = sweep(halves[1], [certificate.thresholds], confidence=measure, cost=cost)
        compute.append(row.compute_pct)
        flops.append(row.flops_pct)
    return (
        f"{measure:9} disagreement <= {promise.epsilon:4.2f}: held in {held} of {count} splits "
        f"(n = {n}; risk {np.mean(risks):.4f}, at most {np.max(risks):.4f}); Compute% "
        f"{np.mean(compute):.1f}, FLOPs% {np.mean(flops):.1f}"
    )


def frontier(trace: ExitTrace, cost) -> None:  # type: ignore[no-untyped-def]
    print("least PPL at FLOPs%".rjust(20) + "".join(name.rjust(12) for name in MEASURES))
    for budget in BUDGETS:
        found = []
        for name in MEASURES:
            try:
                found.append(f"{keep_budget(trace, budget, cost=cost, confidence=name).ppl:12.3f}")
            except ValueError:
                found.append("-".rjust(12))
        print(f"{budget:20}" + "".join(found))
    print(f"{'full model':>20}" + f"{trace.ppl(trace.num_layers):12.3f}")


if __name__ == "__main__":
    main()
