"""The ratios that a run of ``offramp bench`` is about, with their spread over the prompts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from offramp.commands.bench.config import same_bits
from offramp.commands.bench.methods import Sample
from offramp.commands.bench.rows import Compared, Timed, speedups

NEARLY = 0.95
"""The ratio that ``Ratio.nearly`` counts: at most 5% slower."""
Rate = Callable[[Sample], float | None]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How fast one method is beside another one of the same run."""

    method: str
    beside: str
    weights: str
    "The weight format of the method; that of ``beside`` has as many bits."
    of: str
    "What is compared: decoding, or prefill (the run's longer prompts, or else its prompts)."
    ratio: float
    "Ratio of the medians over all prompts and repeats."
    low: float
    "Ratio on the worst prompt (or batch), the median over its repeats."
    high: float
    "The same on the best prompt."
    prompts: int
    "Number of prompts (or batches) that both methods decoded."
    nearly: int
    "Number of them on which the ratio is at least 0.95."


def summary_of(compared: Compared) -> list[Ratio]:
    """Return the ratios of a run, by weight format.

    Full depth is compared with llama.cpp of as many bits, when it decodes and for prompts; exits
    and drafts with full depth of the same format.
    """
    found = []
    for weights, full in compared.full.items():
        peers = {each.method.weights: each for each in _llama(compared)}
        kind = same_bits(weights, peers)
        if kind is not None:
            found += _ratios(full, peers[kind], "decoding", lambda sample: sample.tokens_per_s)
            found += _ratios(full, peers[kind], "prefill", prefill_rate)
        for each in compared.timed:
            own = each.method.name.startswith(("exit@", "speculative@"))
            if own and each.method.weights == weights:
                found += _ratios(each, full, "decoding", lambda sample: sample.tokens_per_s)
    return found


def prefill_rate(sample: Sample) -> float:
    """Prompts per second: the longer prompt of the round, or else the batch itself."""
    return 1 / (sample.prefill_seconds or sample.first_seconds)


def _llama(compared: Compared) -> Iterator[Timed]:
    return (each for each in compared.timed if each.method.name.startswith("llama_cpp_"))


def _ratios(each: Timed, other: Timed, of: str, rate: Rate) -> list[Ratio]:
    by_prompt = speedups(each, other, rate)
    if not by_prompt:
        return []
    mine, theirs = (
        median(rate(sample) or 0.0 for number in by_prompt for sample in timed.samples[number])
        for timed in (each, other)
    )
    return [
        Ratio(
            method=each.method.name,
            beside=other.method.name,
            weights=each.method.weights,
            of=of,
            ratio=mine / theirs,
            low=min(by_prompt.values()),
            high=max(by_prompt.values()),
            prompts=len(by_prompt),
            nearly=sum(value >= NEARLY for value in by_prompt.values()),
        )
    ]
