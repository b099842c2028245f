"""Budgets of ``offramp recipe``: shares of the standard model's FLOPs.

A run counts its costs in percent of its own full model, which is cheaper than the standard model
if its blocks share keys and values. This module is where the search converts between the two: a
specialised exit gets its budget in percent of its own model (``own``), and a held-out frontier is
read in percent of the standard model (``held_out_loss``). The study that measures the recipe
converts the same way (``StaticModels.scaled``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from offramp.calibration.specialise import least_budget, too_low, with_own_heads
from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.evaluation.cost import model_cost
from offramp.models.native.decoder import Transformer
from offramp.studies.study.candidates import Candidate, first_candidate
from offramp.studies.study.done import Done
from offramp.studies.study.frontier import FrontierKey, at, scaled
from offramp.studies.study.plan import Study
from offramp.studies.study.run import StudyRun
from offramp.training.loop import new_model

Rounds = Sequence[tuple[str, Sequence[dict[str, Any]]]]


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """The costs of a study's candidates, in percent of its standard model."""

    study: Study
    vocab_size: int

    def own(self, candidate: Candidate) -> Candidate:
        """The candidate with its budget in percent of its own full model, to 0.01."""
        if candidate.specialise is None:
            return candidate
        budget = candidate.specialise.compute_budget * self._standard_flops
        share = round(min(100.0, budget / self._full_flops(candidate)), 2)
        return candidate.changed(specialise=replace(candidate.specialise, compute_budget=share))

    def possible(self, candidate: Candidate) -> bool:
        """Whether the candidate's exits, which are distinct, can be specialised at its budget."""
        if {*candidate.add} & {*candidate.exits}:
            return False
        mine = self.own(candidate).recipe.specialise
        if mine is None:
            return True
        model = with_own_heads(self._model(**candidate.model), seed=0, add=mine.add_exits)
        return mine.compute_budget >= least_budget(model, mine, context=self._context)

    def check(self, budget: float, rounds: Rounds) -> None:
        """Raise ConfigError where the budget is too low for every exit that the search tries.

        Tested is the earliest exit, with a gate and the most expensive head of the search, with
        the source of keys and values at which it costs least.
        """
        changes = [change for _, changes in rounds for change in changes]
        first = first_candidate(self.study.model.num_hidden_layers)
        earliest = min(
            [*first.exits, *(layer for each in changes for layer in each.get("exits", ()))]
        )
        sources = {first.source, *(each.get("source") for each in changes)}
        least = min(self._least(first.changed(exits=(earliest,), source=each)) for each in sources)
        if budget < least:
            raise too_low(budget, least, earliest)

    def held_out_loss(self, run: StudyRun, folder: Path, budget: float) -> float:
        """Nats a token at the budget, on held-out training text; inf where no policy keeps it.

        Counted is what decoding does: exact figures, or those under ``propagate``.
        """
        done = Done(run=run, folder=folder / run.name)
        key = FrontierKey(
            text="held_out", confidence=run.measures[0], missing_kv=run.conventions[0]
        )
        share = done.record.full_flops / self._standard_flops
        cost, nll = scaled(done.frontiers[key], compute=1.0, flops=share).curve()
        found = float(at(cost, nll, budget))
        return found if math.isfinite(found) else math.inf

    def _least(self, candidate: Candidate) -> float:
        """FLOPs of leaving at the candidate's first exit, in percent of the standard model."""
        model = self._model(**candidate.model)
        config = SpecialiseConfig(missing_kv="propagate")
        share = self._full_flops(candidate) / self._standard_flops
        return least_budget(model, config, context=self._context) * share

    @cached_property
    def _standard_flops(self) -> float:
        return model_cost(self._model(exit_layers=()), context=self._context).full

    def _full_flops(self, candidate: Candidate) -> float:
        """FLOPs of a token in the candidate's full model; exits do not change it."""
        model = self._model(**candidate.model | {"exit_layers": ()})
        return model_cost(model, context=self._context).full

    def _model(self, **shape: Any) -> Transformer:
        return new_model(replace(self.study.model, vocab_size=self.vocab_size, **shape), seed=0)

    @property
    def _context(self) -> float:
        return (self.study.training.seq_len + 1) / 2
