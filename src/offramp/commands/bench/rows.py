"""The rows of the table of ``offramp bench``, from what every method took."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from offramp.commands.bench.methods import Method, Sample
from offramp.commands.bench.row import BenchRow
from offramp.evaluation.clock import Clock


@dataclass(eq=False)
class Timed:
    """A method and its samples, by the number of the batch that it decoded."""

    method: Method
    samples: dict[int, list[Sample]] = field(default_factory=dict)

    @property
    def every(self) -> list[Sample]:
        """The samples of all batches."""
        return [sample for samples in self.samples.values() for sample in samples]


def rows_of(timed: Sequence[Timed], clock: Clock, num_layers: int) -> list[dict[str, Any]]:
    """A row for each method, with the methods ``full`` and ``hf`` as references.

    Batches that ``full`` has not decoded yet, and methods without samples, have no part in it.
    """
    full = next(each for each in timed if each.method.name == "full")
    shared = [
        replace(each, samples={n: each.samples[n] for n in each.samples if n in full.samples})
        for each in timed
    ]
    begun = [each for each in shared if each.samples]
    peer = next((each for each in begun if each.method.name == "hf"), None)
    return [asdict(_row(each, full, peer, clock, num_layers)) for each in begun]


def _row(each: Timed, full: Timed, peer: Timed | None, clock: Clock, num_layers: int) -> BenchRow:
    rates = [sample.tokens_per_s for sample in each.every]
    worked = [(sample.work, sample.count) for sample in each.every if sample.work]
    count = sum(tokens for _, tokens in worked)
    drafted = sum(sample.drafted for sample in each.every)
    accepted = sum(sample.accepted for sample in each.every)
    predictions = [tokens / clock.seconds(work, tokens) for work, tokens in worked]
    identical = all(
        sample.tokens == full.samples[number][0].tokens
        for number, samples in each.samples.items()
        for sample in samples
    )
    layers = sum(work.layers_run for work, _ in worked) / count if count else None
    beside = [] if peer is None else _speedups(each, peer)
    return BenchRow(
        method=each.method.name,
        tokens_per_s={"median": median(rates), "min": min(rates), "max": max(rates)},
        speedup_vs_hf=median(beside) if beside else None,
        speedup_vs_full=median(_speedups(each, full)),
        speedup_vs_full_worst=min(_speedups(each, full)),
        mean_layers=float(num_layers) if each is peer else layers,
        acceptance_rate=accepted / drafted if drafted else None,
        identical_to_greedy=identical,
        predicted_tokens_per_s=median(predictions) if predictions else None,
        first_token_s=median(sample.first_seconds for sample in each.every),
        runs=len(rates),
    )


def _speedups(each: Timed, other: Timed) -> list[float]:
    """For each batch the median ratio of two runs of the same repeat."""
    return [
        median(
            mine.tokens_per_s / theirs.tokens_per_s
            for mine, theirs in zip(samples, other.samples[number], strict=False)
        )
        for number, samples in each.samples.items()
        if number in other.samples
    ]
