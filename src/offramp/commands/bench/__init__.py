"""Decoding on the clock, beside its peers: ``offramp bench``."""

from offramp.commands.bench.run import BenchConfig, run_bench

__all__ = ["BenchConfig", "run_bench"]
