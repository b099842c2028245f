"""The rows of the table of ``offramp bench``, from what every method took."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from offramp.commands.bench.clocks import Clocks
from offramp.commands.bench.config import BITS, same_bits
from offramp.commands.bench.methods import Method, Sample
from offramp.commands.bench.row import BenchRow


@dataclass(eq=False)
class Timed:
    """A method and its samples, by the number of the batch that it decoded."""

    method: Method
    samples: dict[int, list[Sample]] = field(default_factory=dict)
    ppl: float | None = None

    @property
    def every(self) -> list[Sample]:
        """The samples of all batches."""
        return [sample for samples in self.samples.values() for sample in samples]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The methods of a run that have samples, on the batches that all of full depth decoded."""

    timed: Sequence[Timed]
    full: Mapping[str, Timed]
    "Full depth, by weight format."

    @classmethod
    def of(cls, timed: Sequence[Timed]) -> "Compared":
        """Leave out batches that full depth has not decoded yet, and methods without samples."""
        every = [set(each.samples) for each in timed if each.method.name == "full"]
        done = set.intersection(*every)
        shared = [
            replace(each, samples={n: each.samples[n] for n in each.samples if n in done})
            for each in timed
        ]
        begun = [each for each in shared if each.samples]
        full = {each.method.weights: each for each in begun if each.method.name == "full"}
        return cls(timed=begun, full=full)

    def reference(self, each: Timed) -> Timed:
        """Return full depth of the same format, or of as many bits, or else of the first format."""
        name = same_bits(each.method.weights, self.full) or next(iter(self.full))
        return self.full[name]

    def named(self, name: str) -> Timed | None:
        """Return the method of this name; None if it has no samples."""
        return next((each for each in self.timed if each.method.name == name), None)


def rows_of(compared: Compared, clocks: Mapping[str, Clocks], num_layers: int) -> list[BenchRow]:
    """Return a row for each method; ``clocks`` are by weight format."""
    return [_row(each, compared, clocks, num_layers) for each in compared.timed]


def _middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _row(
    each: Timed, compared: Compared, clocks: Mapping[str, Clocks], num_layers: int
) -> BenchRow:
    method, full, peer = each.method, compared.reference(each), compared.named("hf")
    rates = [sample.tokens_per_s for sample in each.every]
    worked = [(sample.work, sample.count) for sample in each.every if sample.work]
    count = sum(tokens for _, tokens in worked)
    drafted = sum(sample.drafted for sample in each.every)
    clock = clocks[method.weights].of(method) if worked else None
    predictions = [tokens / clock.seconds(work, tokens) for work, tokens in worked] if clock else []
    identical = all(
        sample.tokens == full.samples[number][0].tokens
        for number, samples in each.samples.items()
        for sample in samples
    )
    layers = sum(work.layers_run for work, _ in worked) / count if count else None
    against_full = speedups(each, full)
    against_peer = {} if peer is None else speedups(each, peer)
    return BenchRow(
        method=method.name,
        weights=method.weights,
        bits=BITS[method.weights],
        tokens_per_s={"median": median(rates), "min": min(rates), "max": max(rates)},
        ppl=each.ppl if each.ppl is not None and math.isfinite(each.ppl) else None,
        speedup_vs_hf=median(against_peer.values()) if against_peer else None,
        speedup_vs_full=median(against_full.values()),
        speedup_vs_full_worst=min(against_full.values()),
        mean_layers=float(num_layers) if each is peer else layers,
        acceptance_rate=sum(s.accepted for s in each.every) / drafted if drafted else None,
        identical_to_greedy=identical,
        predicted_tokens_per_s=median(predictions) if predictions else None,
        **_limit(each, clocks),
        first_token_s=median(sample.first_seconds for sample in each.every),
        prefill_tokens_per_s=_middle(sample.prefill_tokens_per_s for sample in each.every),
        runs=len(rates),
    )


def _limit(each: Timed, clocks: Mapping[str, Clocks]) -> dict[str, float | None]:
    """The bytes that a method reads for a token, and its rate beside what the memory allows."""
    found, method = [], each.method
    for sample in each.every:
        read = method.bytes_per_step
        if method.name == "hf":
            read = clocks[method.weights].weights.full_depth
        if sample.work is not None:
            read = clocks[method.weights].weights.read_by(sample.work, method.confidence)
            read /= sample.count
        elif read is not None:
            read /= len(sample.tokens)
        if read and sample.bandwidth:
            limit = sample.bandwidth / read
            found.append((read, limit, sample.tokens_per_s / limit))
    middle = [median(values) for values in zip(*found, strict=True)] or [None] * 3
    return dict(
        zip(("bytes_per_token", "limit_tokens_per_s", "share_of_limit"), middle, strict=True)
    )


def speedups(
    each: Timed,
    other: Timed,
    rate: Callable[[Sample], float | None] = lambda sample: sample.tokens_per_s,
) -> dict[int, float]:
    """For each batch the median ratio of two runs of the same repeat."""
    ratios = {}
    for number, samples in each.samples.items():
        pairs = zip(samples, other.samples.get(number, ()), strict=False)
        rates = [(rate(mine), rate(theirs)) for mine, theirs in pairs]
        both = [mine / theirs for mine, theirs in rates if mine and theirs]
        if both:
            ratios[number] = median(both)
    return ratios
