"""Measure the processor time of commands that need no model, such as ``--help``.

    python benchmarks/startup.py [--runs 9]

Prints the median user and system time of the process over interleaved runs, and for comparison
that of a Python that does nothing and of one that imports PyTorch. Before commands and public
names were imported on first use, each command took 2.8 s, because it imported PyTorch.
"""

import argparse
import os
import statistics
import subprocess
import sys

CASES = {
    "python -c pass": ["-c", "pass"],
    "import offramp": ["-c", "import offramp"],
    "offramp --version": ["-m", "offramp", "--version"],
    "offramp --help": ["-m", "offramp", "--help"],
    "offramp train --help": ["-m", "offramp", "train", "--help"],
    "offramp train --stpes 3": ["-m", "offramp", "train", "--stpes", "3"],
    "offramp trian": ["-m", "offramp", "trian"],
    "import torch": ["-c", "import torch"],
}


def processor_seconds(arguments: list[str]) -> float:
    """Return the user and system time of one process."""
    before = os.times()
    subprocess.run(
        [sys.executable, *arguments],
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(runs + 1):
        for name, arguments in CASES.items():
            seconds[name].append(processor_seconds(arguments))
    print(f"{'':<24}  median s  from-to")
    for name, measured in seconds.items():
        kept = measured[1:]  # the first run fills the file cache
        median = statistics.median(kept)
        print(f"{name:<24}  {median:8.2f}  {min(kept):.2f}-{max(kept):.2f}")


if __name__ == "__main__":
    main()
