"""The rows of the table of ``offramp bench``, from what every method took."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from offramp.commands.bench.methods import Method, Sample
from offramp.commands.bench.row import BenchRow
from offramp.evaluation.clock import Clock


@dataclass
class Timed:
    """A method and its samples, by the number of the batch that it decoded."""

    method: Method
    samples: dict[int, list[Sample]] = field(default_factory=dict)

    @property
    def every(self) -> list[Sample]:
        """The samples of all batches."""
        return [sample for samples in self.samples.values() for sample in samples]


def rows_of(timed: Sequence[Timed], clock: Clock, num_layers: int) -> list[dict[str, Any]]:
    """A row for each method, with the methods ``full`` and ``hf`` as references."""
    by_name = {each.method.name: each for each in timed}
    full, peer = by_name["full"], by_name.get("hf")
    return [asdict(_row(each, full, peer, clock, num_layers)) for each in timed]


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
    return BenchRow(
        method=each.method.name,
        tokens_per_s={"median": median(rates), "min": min(rates), "max": max(rates)},
        speedup_vs_hf=None if peer is None else median(_speedups(each, peer)),
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
    ]
