"""Compare two checkouts of offramp: training, sweep, calibration and decoding, interleaved.

    python benchmarks/checkouts.py OLD NEW TEXT [--rounds 5] [--threads 1]

OLD and NEW are the roots of two checkouts whose kernels are built. Each round runs every command
once with each checkout, in turns, as a whole process on the same model and text. Times are wall
seconds of the process; decoding rates are those that ``offramp bench`` reports. A ratio is the
median of the rounds' ratios, new to old: below 1 is less time, above 1 more tokens per second.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SHAPE = [
    "--layers",
    "6",
    "--dim",
    "128",
    "--heads",
    "4",
    "--exits",
    "2",
    "--loss-weights",
    "2=0.5,6=0.5",
]
STEPS = ["--steps", "60", "--seq-len", "128", "--batch-size", "16", "--tracker", "none"]
BENCH = ["--no-peers", "--prompts", "4", "--repeats", "2", "--compute-pct", "65"]


def offramp(root: Path, *arguments: object) -> float:
    """Run a command of a checkout; returns its wall seconds."""
    command = [sys.executable, "-m", "offramp", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{root}: {' '.join(command)}: {done.stderr}")
    return took


def measure(root: Path, model: Path, text: Path, threads: int, scratch: Path) -> dict[str, float]:
    """One round of one checkout: seconds by command, and tokens per second by method."""
    common = ("--threads", threads)
    run, bench = scratch / "run", scratch / "bench.json"
    shutil.rmtree(run, ignore_errors=True)
    found = {
        "train (s)": offramp(
            root, "train", "--corpus", text, *SHAPE, *STEPS, *common, "--out", run
        ),
        "sweep (s)": offramp(root, "sweep", model, "--corpus", text, *common),
        "calibrate (s)": offramp(root, "calibrate", model, "--corpus", text, *common),
    }
    offramp(root, "bench", model, "--corpus", text, *BENCH, *common, "--out", bench)
    for row in json.loads(bench.read_text())["rows"]:
        kind, _, rest = row["method"].partition("@")
        name = f"{kind} {rest.rpartition(':')[2]}" if kind == "exit" else kind
        found[f"{name} (tokens/s)"] = row["tokens_per_s"]["median"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ["OFFRAMP_CACHE"] = str(scratch / "cache")
        model = scratch / "model"
        offramp(arguments.old, "train", "--corpus", arguments.text, *SHAPE, *STEPS, "--out", model)
        rounds = []
        for number in range(arguments.rounds):
            order = (arguments.old, arguments.new)[:: 1 if number % 2 else -1]
            rounds.append(
                {
                    root: measure(root, model, arguments.text, arguments.threads, scratch)
                    for root in order
                }
            )
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    print(f"{'':28}{'old':>10}{'new':>10}{'ratio':>8}  least to most")
    for key in rounds[0][arguments.new]:
        old, new = ([each[root][key] for each in rounds] for root in (arguments.old, arguments.new))
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{key:28}{median(old):10.2f}{median(new):10.2f}{median(ratios):8.2f}  {spread}")


if __name__ == "__main__":
    main()
