"""The methods that the seed document compares, and what was measured of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from offramp.data import Corpus
from offramp.evaluation.sweep import SweepRow, sweep
from offramp.evaluation.trace import ExitTrace
from offramp.exits.weightings import parse_loss_weights
from offramp.studies.reproduce.published import CORPUS, TEXT_THRESHOLD, THRESHOLD
from offramp.studies.reproduce.run import RunResult, load_run
from offramp.studies.statistics import Seeds

Epoch = Literal["best", "last"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of training."""

    key: str
    label: str
    loss_weights: str
    num_layers: int = 3
    routed: bool = True
    "Whether tokens may leave at layer 1; the baselines always run all layers."

    @property
    def exits(self) -> tuple[int, ...]:
        """The layers after which tokens may leave."""
        return (1, self.num_layers) if self.routed else (self.num_layers,)

    @property
    def weights(self) -> dict[str, float]:
        """The loss weight of every layer, for the reports."""
        weights = parse_loss_weights(
            self.loss_weights, num_layers=self.num_layers, exit_layers=(1, self.num_layers)
        )
        return {str(layer): weights.get(layer, 0.0) for layer in range(1, self.num_layers + 1)}


def asymmetric(alpha: float) -> Method:
    """The asymmetric loss with this weight of the shallow exit."""
    return Method(
        key=f"alpha-{alpha}", label=f"asymmetric, α = {alpha}", loss_weights=f"asymmetric:{alpha}"
    )


STANDARD_3 = Method(
    key="standard-3", label="standard, 3 layers", loss_weights="standard", routed=False
)
STANDARD_1 = Method(
    key="standard-1",
    label="standard, 1 layer",
    loss_weights="standard",
    num_layers=1,
    routed=False,
)
ALPHA_03, ALPHA_05, ALPHA_07 = (asymmetric(alpha) for alpha in (0.3, 0.5, 0.7))
ALL_LAYERS = Method(
    key="all-layers-0.7",
    label="all layers, α = 0.7",
    loss_weights="asymmetric_deep_supervision:0.7",
)
METHODS: dict[str, Method] = {
    method.key: method
    for method in (ALPHA_03, ALPHA_05, ALPHA_07, ALL_LAYERS, STANDARD_3, STANDARD_1)
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs of every method with the same seeds on one corpus.

    A threshold of None is the threshold at which the findings are tested.
    """

    corpus: Corpus
    seeds: tuple[int, ...]
    runs: dict[str, tuple[RunResult, ...]]
    "By the method's key, one run per seed."
    more: tuple[Method, ...] = ()
    "Methods beside the document's."

    @property
    def methods(self) -> tuple[Method, ...]:
        """The document's methods, then the others."""
        return (*METHODS.values(), *self.more)

    @property
    def threshold(self) -> float:
        """The threshold at which the findings are tested on this corpus."""
        return THRESHOLD if self.corpus.name == CORPUS else TEXT_THRESHOLD

    def traces(self, method: Method, epoch: Epoch = "best") -> list[ExitTrace]:
        """The traces over all layers, one per seed."""
        return [getattr(run, epoch) for run in self.runs[method.key]]

    def rows(
        self, method: Method, threshold: float | None = None, epoch: Epoch = "best"
    ) -> list[SweepRow]:
        """The routed figures, one row per seed."""
        at = self.threshold if threshold is None else threshold
        return [sweep(trace.at(method.exits), [at])[0] for trace in self.traces(method, epoch)]

    def log_ppl(self, method: Method, threshold: float | None = None) -> Seeds:
        """Log of the routed PPL at the best epoch, one per seed."""
        return np.log([row.ppl for row in self.rows(method, threshold)])

    def log_exit_ppl(self, method: Method, layer: int) -> Seeds:
        """Log of the PPL of all tokens at a layer, best epoch, one per seed."""
        return np.log([trace.ppl(layer) for trace in self.traces(method)])

    @cached_property
    def about(self) -> dict[str, Any]:
        """run.json of the first seed of the document's recommended method."""
        return self.runs[ALPHA_07.key][0].about


def load_study(
    corpus: Corpus, folder: Path, seeds: Sequence[int], more: tuple[Method, ...] = ()
) -> Study:
    """Read every method's runs with these seeds."""
    keys = [*METHODS, *(method.key for method in more)]
    return Study(
        corpus=corpus,
        seeds=tuple(seeds),
        runs={key: tuple(load_run(folder / f"{key}-seed{seed}") for seed in seeds) for key in keys},
        more=more,
    )
