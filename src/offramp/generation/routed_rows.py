"""The rows whose tokens a model routes in one call (models/router.py).

A router keeps the pending tokens of its rows, and has one rule. So a row is decoded by the router
or step by step for as long as it has a text, and all rows of the router have the same rule.
"""

from collections.abc import Sequence

from torch import Tensor

from offramp.generation.exit_rule import ExitRule, broken_score
from offramp.generation.exits import Exits
from offramp.generation.ladder import Ladder
from offramp.generation.routing import router_spec
from offramp.models.base import FEW_TOKENS, EarlyExitModel
from offramp.models.kv_cache import KVCache
from offramp.models.missing_kv import MissingKV
from offramp.models.router import Router
from offramp.models.work import Work


class RoutedRows:
    """Some rows of a cache, their rule, and their router. Without a router there are none."""

    def __init__(self, model: EarlyExitModel, cache: KVCache, *, batch_size: int) -> None:
        self.model, self.cache = model, cache
        self.rows: set[int] = set()
        self._last: list[int] = []
        "The rows of the last step."
        self._may = batch_size <= FEW_TOKENS
        self._router: Router | None = None
        self._made_for: tuple[ExitRule | None, MissingKV] | None = None
        self._bounds_of_a_rung = 1
        "One, or one for each new token if the threshold decays."

    def take(
        self,
        row: int,
        rule: ExitRule | None,
        missing_kv: MissingKV,
        *,
        first: bool,
        ladder: Ladder = (),
    ) -> None:
        """Take a row whose text begins, if its rule is that of the others.

        If it is the ``first`` of all rows that decode, its rule becomes the router's. ``ladder``
        is that of the rule if its tokens have rungs, which then holds for all rows.
        """
        if not self._may or type(rule) not in (ExitRule, type(None)):
            return
        same = self._made_for == (rule, missing_kv)
        if first and not same:
            self._made_for, self._router = (rule, missing_kv), self._new(rule, missing_kv, ladder)
        if self._router is not None and (first or (same and self.rows)):
            self.rows.add(row)

    def drop(self, row: int) -> None:
        """Forget a row, whose text is complete."""
        if row in self.rows and self._router is not None:
            self.rows.remove(row)
            self._router.drop(row)

    def step(
        self,
        ids: Sequence[int],
        rows: list[int],
        lengths: list[int],
        new: list[int],
        work: Work,
        *,
        rungs: list[int] | None = None,
    ) -> Exits:
        """Run the next token of each of ``rows`` in one call of the model.

        ``lengths`` and ``new`` are the tokens and the new tokens of each before it, and ``rungs``
        those of the ladder, if there is one.
        """
        assert self._router is not None
        self._last = rows
        if rungs is not None:
            width = self._bounds_of_a_rung
            new = [
                rung * width + min(count, width - 1) for rung, count in zip(rungs, new, strict=True)
            ]
        routed = self._router.step(list(ids), rows, lengths, new, work)
        if not routed.broken:
            return Exits(
                rows=rows,
                logits=routed.logits,
                exit_layers=routed.exit_layers,
                confidence=routed.confidence,
                likeliest=routed.likeliest,
            )
        assert self._made_for is not None
        assert self._made_for[0] is not None
        name = self._made_for[0].confidence
        errors = {rows[n]: broken_score(name, layer) for n, layer in routed.broken.items()}
        whole = [n for n in range(len(rows)) if n not in routed.broken]
        return Exits(
            rows=[rows[n] for n in whole],
            logits=routed.logits[whole],
            exit_layers=[routed.exit_layers[n] for n in whole],
            confidence=[routed.confidence[n] for n in whole],
            errors=errors,
        )

    def run_on(self, row: int, work: Work) -> Tensor:
        """Return the last layer's logits of a row's last token, which left early."""
        assert self._router is not None
        return self._router.run_on(self._last.index(row), work)

    def _new(self, rule: ExitRule | None, missing_kv: MissingKV, ladder: Ladder) -> Router | None:
        exits, tokens = self.model.exit_layers, self.cache.capacity
        spec = router_spec(rule, exits, missing_kv=missing_kv, tokens=tokens, ladder=ladder)
        if spec is not None and spec.exits and ladder:
            self._bounds_of_a_rung = len(spec.exits[0].bounds) // len(ladder)
        return None if spec is None else self.model.router(self.cache, spec)
