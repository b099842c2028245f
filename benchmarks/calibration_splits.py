"""Test whether certificates hold on new text, and compare gates with max_prob at equal FLOPs.

The model is traced once on the text of --test. Then the sequences are divided at random into two
halves, 20 times: thresholds are certified on one half, by each of --tests, and checked on the
other. After that, the PPL at equal FLOPs (heads and gates counted) is printed for each measure,
with gates that are fitted on --train. Figures are under missing_kv="recompute".

    python benchmarks/calibration_splits.py MODEL --train valid.txt --test test.txt
    python benchmarks/calibration_splits.py MODEL --test test.txt --measures max_prob
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from offramp.calibration.budget import keep_budget
from offramp.calibration.certify import certify
from offramp.calibration.check import check_drift
from offramp.calibration.fitting import fit_exits
from offramp.calibration.promise import Promise
from offramp.calibration.risk import whole_sequences
from offramp.data import batches, encode
from offramp.evaluation.cost import model_cost
from offramp.evaluation.trace import ExitTrace, collect_trace
from offramp.models.open import open_model

MEASURES = ("max_prob", "gate", "gain")
EPSILONS = (0.02, 0.05, 0.10)
BUDGETS = (95, 90, 85, 80, 75, 70, 65, 60, 55, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--train", type=Path, help="default: keep the gates that the model has")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--train-tokens", type=int, default=131_072)
    parser.add_argument("--test-tokens", type=int, default=131_072)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--measures", nargs="+", default=MEASURES)
    parser.add_argument("--tests", nargs="+", default=["hoeffding-bentkus", "auto"])
    arguments = parser.parse_args()
    opened = open_model(arguments.model)
    model, tokenizer = opened.model, opened.tokenizer

    def windows(path, tokens, order=None):  # type: ignore[no-untyped-def]
        ids = encode(tokenizer, path.read_text(encoding="utf-8"))[: tokens + 1]
        return batches(ids, seq_len=arguments.seq_len, batch_size=8, order=order)

    fitted = opened.fitted
    if arguments.train:
        start, order = time.perf_counter(), torch.Generator().manual_seed(0)
        fitted = fit_exits(model, windows(arguments.train, arguments.train_tokens, order))
        print(f"gates fitted in {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    trace = whole_sequences(
        collect_trace(
            model,
            windows(arguments.test, arguments.test_tokens),
            measures=arguments.measures,
            fitted=fitted,
        )
    )
    print(f"trace of {trace.num_tokens:,} tokens in {time.perf_counter() - start:.0f} s")
    cost = model_cost(model, context=(arguments.seq_len + 1) / 2, fitted=fitted)
    for measure in arguments.measures:
        for epsilon in EPSILONS:
            for test in arguments.tests:
                promise = Promise(epsilon=epsilon, delta=arguments.delta, test=test)
                print(splits(trace, measure, promise, cost, arguments.splits), flush=True)
    frontier(trace, cost, arguments.measures)


def splits(trace: ExitTrace, measure: str, promise: Promise, cost, count: int) -> str:  # type: ignore[no-untyped-def]
    checks, n = [], 0
    sequences = np.unique(trace.sequence)
    for split in range(count):
        order = np.random.default_rng(split).permutation(sequences)
        halves = [trace.tokens(np.isin(trace.sequence, part)) for part in np.array_split(order, 2)]
        certificate = certify(
            halves[0], promise, model_sha256="", corpus_sha256="", confidence=measure, cost=cost
        )
        n = certificate.n
        checks.append(check_drift(certificate, halves[1], level=promise.delta, cost=cost))
    risks = [check.risk for check in checks]
    return (
        f"{measure:9} {promise.test:18} disagreement <= {promise.epsilon:4.2f}: held in "
        f"{sum(risk <= promise.epsilon for risk in risks)} of {count} splits, the check says "
        f"broken in {sum(check.verdict == 'broken' for check in checks)} and holds in "
        f"{sum(check.verdict == 'holds' for check in checks)} (n = {n}; risk {np.mean(risks):.4f}, "
        f"at most {np.max(risks):.4f}); Compute% {np.mean([c.compute_pct for c in checks]):.1f}, "
        f"FLOPs% {np.mean([c.flops_pct for c in checks]):.1f}"
    )


def frontier(trace: ExitTrace, cost, measures) -> None:  # type: ignore[no-untyped-def]
    print("least PPL at FLOPs%".rjust(20) + "".join(name.rjust(12) for name in measures))
    for budget in BUDGETS:
        found = []
        for name in measures:
            try:
                found.append(f"{keep_budget(trace, budget, cost=cost, confidence=name).ppl:12.3f}")
            except ValueError:
                found.append("-".rjust(12))
        print(f"{budget:20}" + "".join(found))
    print(f"{'full model':>20}" + f"{trace.ppl(trace.num_layers):12.3f}")


if __name__ == "__main__":
    main()
