"""Confident exit: each token leaves at the first exit whose confidence reaches the threshold.

The token's keys and values in the layers above that exit are computed when a later token needs
them: see deferred.py.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from offramp.errors import GenerationError
from offramp.exits.confidence import Agreement, ExitView
from offramp.generation.deferred import DeferredKV, PendingToken, Segment
from offramp.generation.exit_rule import ExitRule, broken_score
from offramp.generation.exits import Exits, Left, Running, at_last_layer, both, by_identity, joined
from offramp.generation.ladder import Ladders
from offramp.generation.prefill import Prefill
from offramp.generation.routed_rows import RoutedRows
from offramp.generation.transfer import on_device
from offramp.generation.waiting import Waiting
from offramp.models.base import EarlyExitModel, Step
from offramp.models.kv_cache import KVCache
from offramp.models.missing_kv import MissingKV
from offramp.models.work import Work


class ExitDecoder:
    """Decodes one token of each row at a time; each row leaves at the first exit that allows it.

    Rows are those of the cache. ``seat`` gives a row a text with its own rule, and ``forget`` ends
    it; ``rule`` and ``missing_kv`` are those of a row until then. With the rule None all layers
    run. ``work`` counts the work of new tokens, including deferred keys and values. ``max_wait``
    is the bound of waiting.py. With ``climbs`` tokens leave by rungs of ladders: see ``climb``.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        cache: KVCache,
        *,
        batch_size: int,
        rule: ExitRule | None = None,
        missing_kv: MissingKV = "propagate",
        max_wait: int = 0,
        work: Work | None = None,
        climbs: bool = False,
    ) -> None:
        self.model, self.cache, self.rule = model, cache, rule
        self.batch_size, self.lengths = batch_size, [0] * batch_size
        self.work = Work() if work is None else work
        self._rules, self._prompts = [rule] * batch_size, [0] * batch_size
        self._ways: list[MissingKV] = [missing_kv] * batch_size
        self._ladders = Ladders(len(model.exit_layers), used=climbs)
        self._seated: set[int] = set()
        self._routed = RoutedRows(model, cache, batch_size=batch_size)
        self._waiting = Waiting(max_wait)
        self._agreed: dict[int, Agreement] = {}  # by row, for patience
        self._states: dict[int, Tensor] = {}  # at which the last token of each row left early
        self._deferred = DeferredKV(model, cache, missing_kv=self._ways, work=self.work)

    def seat(
        self, row: int, prompt_tokens: int, *, rule: ExitRule | None, missing_kv: MissingKV
    ) -> None:
        """Give a row a text whose prompt is in the cache."""
        self.lengths[row] = self._prompts[row] = prompt_tokens
        ladder, first = self._ladders.begin(row, rule), not self._seated
        self._rules[row], self._ways[row] = None if ladder else rule, missing_kv
        if not self._waiting.bound:
            self._routed.take(row, rule, missing_kv, first=first, ladder=ladder)
        self._seated.add(row)

    def climb(self, row: int, rung: int) -> bool:
        """Let the next token of a row leave by a rung of its ladder; return whether it may."""
        rule = self._ladders.climb(row, rung)
        self._rules[row] = rule
        return rule is not None

    @property
    def waiting(self) -> Collection[int]:
        """The rows whose tokens wait at an exit."""
        return self._waiting.rows

    def rows_of(self, row: int) -> Int[Tensor, " 1"] | None:
        """Return the ``rows`` of a step with only this row; None in a cache of one row."""
        return None if self.batch_size == 1 else on_device([row], self.model.device)

    def forget(self, row: int) -> None:
        """End the text of a row: nothing of it is pending or waits any more."""
        self._seated.discard(row)
        self._ladders.end(row)
        self._routed.drop(row)
        self._deferred.forget(row)
        self._waiting.forget(row)
        self._states.pop(row, None)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Exits:
        """Run the prompt of each row at full depth, one after another."""
        logits = []
        for row, prompt in enumerate(prompts):
            prefill = Prefill(self.model, self.cache, list(prompt), rows=self.rows_of(row))
            prefill.run(math.inf)
            assert prefill.logits is not None
            logits.append(prefill.logits)
            self.lengths[row] = self._prompts[row] = len(prompt)
        return at_last_layer(torch.cat(logits), list(range(len(prompts))), self.model.num_layers)

    def decode_one_token(self, ids: Sequence[int], rows: Sequence[int]) -> Exits:
        """Run the next token of each of ``rows`` (ascending) until it leaves.

        Raises GenerationError for a confidence that is not a number.
        """
        exits = self.decode(ids, rows)
        for error in exits.errors.values():
            raise error
        return exits

    def decode(self, ids: Sequence[int], rows: Sequence[int]) -> Exits:
        """Run the next token of each of ``rows`` (ascending), which have none that waits.

        The result has the tokens that left: all of them and those that waited before, except those
        that wait now. Without ``rows`` all that wait go on.
        """
        if not self._seated:  # the rows have the decoder's own rule
            for row in range(self.batch_size):
                self.seat(row, self.lengths[row], rule=self.rule, missing_kv=self._ways[row])
        routed = [row for row in rows if row in self._routed.rows]
        if len(routed) == len(rows) and routed:
            exits = self._route_at_once(ids, routed)
        elif not routed:
            exits = self._step_by_step(ids, rows)
        else:
            of = dict(zip(rows, ids, strict=True))
            others = [row for row in rows if row not in self._routed.rows]
            exits = both(
                self._route_at_once([of[row] for row in routed], routed),
                self._step_by_step([of[row] for row in others], others),
            )
        for row in (*exits.rows, *exits.errors):
            self.lengths[row] += 1
        return exits

    def run_on(self, row: int, work: Work) -> Float[Tensor, " V"] | None:
        """Return the last layer's logits of a row's last token, which left; None if not routed."""
        return self._routed.run_on(row, work) if row in self._routed.rows else None

    def left_at(self, row: int) -> tuple[Float[Tensor, " D"], list[PendingToken]]:
        """Return the state at which a row's last token left early, and the row's pending tokens."""
        return self._states[row], self._deferred.pending(row)

    def way_of(self, row: int) -> MissingKV:
        """Return how the missing keys and values of a row are computed."""
        return self._ways[row]

    def _route_at_once(self, ids: Sequence[int], rows: list[int]) -> Exits:
        lengths = [self.lengths[row] for row in rows]
        new = [self.lengths[row] - self._prompts[row] for row in rows]
        rungs = self._ladders.rungs(rows)
        return self._routed.step(ids, rows, lengths, new, self.work, rungs=rungs)

    @torch.inference_mode()
    def _step_by_step(self, ids: Sequence[int], rows: Sequence[int]) -> Exits:
        self._waiting.begin(rows)
        step = self._step(rows)
        h = on_device(ids, self.model.device)[:, None]
        at = Running(h=self.model.embed(h, step=step) if rows else h, rows=list(rows), step=step)
        left: dict[int, Left] = {}
        errors: dict[int, GenerationError] = {}
        self._route(at, left, errors)
        last = None
        if at.rows:
            layer = self.model.num_layers
            self._to_exit(at, layer)
            self.work.heads[layer, len(at.rows)] += 1
            last = at_last_layer(self._logits(at.h, layer), at.rows, layer)
        return joined(left, last, errors)

    def _route(
        self, at: Running, left: dict[int, Left], errors: dict[int, GenerationError]
    ) -> None:
        """Run from exit to exit, each time with the rows that have not left yet."""
        for index, layer in enumerate(self.model.exit_layers[:-1]):
            decides = self._decides(at.rows)
            stops = self._waiting.at(layer) or self._deferred.waits(layer, at.rows)
            if not decides and not stops:
                continue  # to run past this exit
            before = at.rows
            if before:
                previous = self._to_exit(at, layer)
                on = self._leave(index, at, previous, left, errors) if decides else before
                if len(on) < len(before):
                    at.h, at.rows = _some(at.h, on), [before[place] for place in on]
            if self._waiting.bound:
                at.h, at.rows = self._waiting.meet(layer, at.h, at.rows)
                at.layer = layer
            if not at.rows and not self._waiting:
                return
            if at.rows is not before and at.rows:
                at.step = self._step(at.rows)

    def _leave(
        self,
        index: int,
        at: Running,
        previous: Tensor,
        left: dict[int, Left],
        errors: dict[int, GenerationError],
    ) -> list[int]:
        """Evaluate the ``index``-th exit, where the rows are; return the places that go on."""
        on: list[int] = []
        for rule, places in by_identity(self._rules, at.rows):
            if rule is None:
                on += places
                continue
            rows, h, before = at.rows, at.h, previous
            if len(places) < len(rows):
                rows = [rows[place] for place in places]
                h, before = _some(h, places), _some(before, places)
            view = ExitView(
                exit_layer=at.layer,
                logits=partial(self._logits, h, at.layer),
                state=h[:, 0],
                previous_state=before[:, 0],
                earlier=self._earlier(rows) if rule.confidence == "patience" and index else None,
                fitted=rule.fitted,
            )
            since_prompt = [self.lengths[row] - self._prompts[row] for row in rows]
            scores, leaving = rule.evaluate(index, view, since_prompt)
            self.work.evaluations[at.layer, len(rows)] += 1
            whole = [n for n, score in enumerate(scores) if score == score]
            out = [n for n in whole if leaving[n]]
            on += [places[n] for n in whole if not leaving[n]]
            for n in set(range(len(rows))).difference(whole):
                errors[rows[n]] = broken_score(rule.confidence, at.layer)
            for n, logits in zip(out, self._logits_of(out, view, h, rule), strict=True):
                left[rows[n]] = Left(logits, at.layer, scores[n])
                self._states[rows[n]] = h[n, 0]
                self._deferred.defer(at.layer, rows[n], h[n, 0], self.lengths[rows[n]])
            if rule.confidence == "patience":
                for n, row in enumerate(rows):
                    self._agreed[row] = Agreement(*(part[n] for part in view.agreement))
        return sorted(on)

    def _decides(self, rows: list[int]) -> bool:
        return any(self._rules[row] is not None for row in rows)

    def _earlier(self, rows: list[int]) -> Agreement:
        return Agreement(*map(torch.stack, zip(*map(self._agreed.__getitem__, rows), strict=True)))

    def _to_exit(self, at: Running, stop: int) -> Float[Tensor, "B 1 D"]:
        """Run the rows' tokens to an exit; return the states before: see ``DeferredKV.run``."""
        segment = Segment(
            h=at.h,
            start=at.layer,
            stop=stop,
            rows=at.rows,
            positions=[self.lengths[row] for row in at.rows],
            step=at.step,
            previous_state=any(
                rule is not None and rule.measure.needs_previous_state
                for rule in map(self._rules.__getitem__, at.rows)
            ),
        )
        previous, at.h = self._deferred.run(segment)
        at.layer = stop
        return previous

    def _logits_of(
        self, out: list[int], view: ExitView, h: Float[Tensor, "B 1 D"], rule: ExitRule
    ) -> Iterable[Tensor]:
        """Return the logits of the tokens ``out``, which leave here, from the view if possible."""
        if not out:
            return ()
        every = len(out) == len(h)
        if rule.measure.needs_head:
            return view.logits if every else _some(view.logits, out)
        self.work.heads[view.exit_layer, len(out)] += 1
        return self._logits(h if every else _some(h, out), view.exit_layer)

    def _logits(self, h: Float[Tensor, "B 1 D"], layer: int) -> Float[Tensor, "B V"]:
        return self.model.unembed(h, layer)[:, 0]

    def _step(self, rows: Sequence[int]) -> Step:
        """Return the step of the next token of each row."""
        device = self.model.device
        places = [self.lengths[row] for row in rows]
        chosen = None if len(rows) == self.batch_size else on_device(rows, device)
        return Step(
            positions=on_device(places, device)[:, None],
            cache=self.cache,
            rows=chosen,
            end=max(places, default=0) + 1,
        )


def _some(h: Float[Tensor, "B *N"], places: list[int]) -> Float[Tensor, "n *N"]:
    return h[on_device(places, h.device)]
