"""Time the reproduction's training runs in one process with two threads, and in two with one.

    python benchmarks/processes.py

With small models, such as those of the seed document, two threads lose time on synchronisation.
The figures of this script are the reason why ``offramp reproduce`` uses one thread per process.
The two ways are timed alternately.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from offramp.data import load_corpus
from offramp.studies.reproduce.study import plan_runs
from offramp.studies.runs import run_all

WAYS = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    runs = [
        replace(run, training=replace(run.training, epochs=2))
        for run in plan_runs(load_corpus("pangram"), 1, device="cpu")
    ]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way, (jobs, threads) in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                run_all(
                    runs,
                    Path(folder),
                    jobs=jobs,
                    threads=threads,
                    on_progress=lambda progress: None,
                    on_done=lambda name: None,
                )
                seconds[way].append(time.perf_counter() - start)
    for way, values in seconds.items():
        print(f"{way:22} {statistics.median(values):6.1f} s for {len(runs)} runs")


if __name__ == "__main__":
    main()
