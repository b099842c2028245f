"""Decoding on the clock, beside its peers: ``offramp bench``."""

from offramp.experiments.bench.run import BenchConfig, run_bench

__all__ = ["BenchConfig", "run_bench"]
