"""Confident exit: each token leaves at the first exit whose confidence reaches the threshold.

The token's keys and values in the layers above that exit are computed when a later token needs
them: see deferred.py.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from offramp.errors import GenerationError
from offramp.exits.confidence import Agreement, Confidence, ExitView, confidence_named
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.deferred import DeferredKV, Segment
from offramp.generation.routing import router_spec
from offramp.models.base import FEW_TOKENS, EarlyExitModel, Step
from offramp.models.kv_cache import KVCache
from offramp.models.missing_kv import MissingKV
from offramp.models.router import Routed, Router
from offramp.models.work import Work

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("float32"),
    torch.float64: np.dtype("float64"),
}


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """A policy and the confidence measure that it reads."""

    policy: ThresholdPolicy | GainPolicy
    confidence: str = "max_prob"
    fitted: FittedExits = NOTHING_FITTED

    @property
    def measure(self) -> Confidence:
        """The confidence measure of this name."""
        return confidence_named(self.confidence)

    def evaluate(
        self, index: int, view: ExitView, positions: list[int]
    ) -> tuple[list[float], list[bool]]:
        """Return the confidence of each token at the ``index``-th exit, and whether it leaves.

        ``positions`` are used only if the threshold decays: see ``Decay``. Raises GenerationError
        for a confidence that is not a number.
        """
        scores = self.measure.score(view)
        confidence: list[float] = scores.tolist()
        read = view.logits.amax(dim=-1).tolist() if self.confidence == "patience" else confidence
        check_confidence_scores(read, self.confidence, view.exit_layer)  # patience counts anything
        if isinstance(self.policy, GainPolicy):
            return confidence, self.policy.leaves(index, view.expected_kl).tolist()
        if self.policy.decay:
            return confidence, self.policy.leaves(index, scores, torch.tensor(positions)).tolist()
        bound = float(self.policy.bound(index, _NUMPY[scores.dtype]))  # in the scores' precision
        return confidence, [score >= bound for score in confidence]


def check_confidence_scores(scores: Iterable[float], measure: str, layer: int) -> None:
    """Raise a GenerationError that names the exit if one of its confidence scores is NaN."""
    if any(score != score for score in scores):
        raise GenerationError(
            f"exit layer {layer}: expected {measure} scores that are finite numbers, got nan: "
            "check the weights of the model and its precision"
        )


class ExitDecoder:
    """Decodes one token of each row at a time; each row leaves at the first exit that allows it.

    With ``rule`` None all layers run. ``work`` counts the work of new tokens, including deferred
    keys and values.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        cache: KVCache,
        *,
        batch_size: int,
        rule: ExitRule | None = None,
        missing_kv: MissingKV = "propagate",
    ) -> None:
        self.model, self.cache, self.rule = model, cache, rule
        self.batch_size, self.lengths = batch_size, [0] * batch_size
        self.work = Work()
        self.drafted = self.accepted = 0  # this decoder drafts no tokens
        self.exits = model.exit_layers if rule else (model.num_layers,)
        self._prompts = [0] * batch_size
        self._missing_kv: MissingKV = missing_kv
        self._router: Router | None = None  # made for the first token, which follows a prompt
        self._started = False
        self._deferred = DeferredKV(
            model,
            cache,
            batch_size=batch_size,
            missing_kv=missing_kv,
            work=self.work,
            previous_state=rule is not None and rule.measure.needs_previous_state,
        )

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Routed:
        """Run the prompts at full depth; rows are padded on the left.

        Blocks above ``complete_from`` write no keys and values of their own, so they run only for
        the last token of each row.
        """
        model, width = self.model, max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        real = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            real[row, width - len(prompt) :] = True
        self.lengths = [len(prompt) for prompt in prompts]
        self._prompts = list(self.lengths)
        step = Step(
            positions=(real.cumsum(dim=1) - 1).clamp(min=0).to(model.device),
            real=None if bool(real.all()) else real.to(model.device),
            cache=self.cache,
        )
        h = model.embed(ids.to(model.device), step=step)
        complete, layers = model.complete_from, model.num_layers
        h = model.run_layers(h, 0, complete, step=step)
        if complete < layers:
            model.project_kv(h, complete, model.cache_layers, step=step)
            last = Step(positions=step.positions[:, -1:], cache=self.cache)
            h = model.run_layers(h[:, -1:], complete, layers, step=last)
        return _at_last_layer(model.unembed(h[:, -1:], layers)[:, 0], layers)

    def decode_one_token(self, ids: Sequence[int], rows: Sequence[int]) -> Routed:
        """Run the next token of each of ``rows`` (ascending) until it leaves."""
        if not self._started:
            self._started, self._router = True, self._new_router()
        if self._router is not None:
            return self._routed(self._router, ids, rows)
        return self._step_by_step(ids, rows)

    @torch.inference_mode()
    def _step_by_step(self, ids: Sequence[int], rows: Sequence[int]) -> Routed:
        step = self._step(rows)
        h = self.model.embed(torch.tensor(ids, device=self.model.device)[:, None], step=step)
        if self.rule is None:
            _, h = self._to_exit(h, 0, self.model.num_layers, list(rows), step)
            exits = self._last(h)
        else:
            exits = self._route(h, list(rows), self.rule, step)
        for row in rows:
            self.lengths[row] += 1
        return exits

    def _new_router(self) -> Router | None:
        """Return a router for the rule, if the model has one: see models/router.py."""
        if self.batch_size > FEW_TOKENS or type(self.rule) not in (ExitRule, type(None)):
            return None
        spec = router_spec(
            self.rule, self.exits, missing_kv=self._missing_kv, tokens=self.cache.capacity
        )
        return None if spec is None else self.model.router(self.cache, spec)

    def _routed(self, router: Router, ids: Sequence[int], rows: Sequence[int]) -> Routed:
        """Run the next token of each of ``rows`` in one call of the model."""
        places = [self.lengths[row] for row in rows]
        since = [self.lengths[row] - self._prompts[row] for row in rows]
        routed = router.step(list(ids), list(rows), places, since, self.work)
        for layer in routed.broken.values():
            assert self.rule is not None
            check_confidence_scores([math.nan], self.rule.confidence, layer)
        for row in rows:
            self.lengths[row] += 1
        return routed

    def _route(
        self, h: Float[Tensor, "B 1 D"], rows: list[int], rule: ExitRule, step: Step
    ) -> Routed:
        """Run from exit to exit, each time with the rows that have not left yet."""
        left: dict[int, tuple[Tensor, int, float]] = {}  # by row: logits, exit layer, confidence
        running, done, agreement = list(rows), 0, None
        for index, layer in enumerate(self.exits[:-1]):
            previous, h = self._to_exit(h, done, layer, running, step)
            done = layer
            view = ExitView(
                exit_layer=layer,
                logits=partial(self._logits, h, layer),
                state=h[:, 0],
                previous_state=previous[:, 0],
                earlier=agreement,
                fitted=rule.fitted,
            )
            since_prompt = [self.lengths[row] - self._prompts[row] for row in running]
            scores, leaving = rule.evaluate(index, view, since_prompt)
            self.work.evaluations[layer, len(running)] += 1
            out = [i for i, leaves in enumerate(leaving) if leaves]
            on = [i for i, leaves in enumerate(leaving) if not leaves]
            for i, logits in zip(out, self._logits_of(out, view, h, rule), strict=True):
                left[running[i]] = (logits, layer, scores[i])
                self._deferred.defer(layer, running[i], h[i, 0], self.lengths[running[i]])
            if not on:
                break
            if out:
                h, running = h[on], [running[i] for i in on]
                step = self._step(running)
            if rule.confidence == "patience":
                agreement = Agreement(*(part[on] for part in view.agreement))
        else:
            _, h = self._to_exit(h, done, self.exits[-1], running, step)
            last = self._last(h)
            for i, row in enumerate(running):
                left[row] = (last.logits[i], last.exit_layers[i], last.confidence[i])
        ordered = [left[row] for row in rows]
        return Routed(
            logits=torch.stack([logits for logits, _, _ in ordered])
            if len(ordered) > 1
            else ordered[0][0][None],
            exit_layers=[layer for _, layer, _ in ordered],
            confidence=[score for _, _, score in ordered],
        )

    def _to_exit(
        self, h: Float[Tensor, "B 1 D"], start: int, stop: int, rows: list[int], step: Step
    ) -> tuple[Tensor, Tensor]:
        """Run the rows' tokens to the next exit: see ``DeferredKV.run``."""
        positions = [self.lengths[row] for row in rows]
        segment = Segment(h=h, start=start, stop=stop, rows=rows, positions=positions, step=step)
        return self._deferred.run(segment)

    def _logits_of(
        self, out: list[int], view: ExitView, h: Float[Tensor, "B 1 D"], rule: ExitRule
    ) -> Iterable[Tensor]:
        """Return the logits of the tokens ``out``, which leave here, from the view if possible."""
        if not out:
            return ()
        every = len(out) == len(h)
        if rule.measure.needs_head:
            return view.logits if every else view.logits[out]
        self.work.heads[view.exit_layer, len(out)] += 1
        return self._logits(h if every else h[out], view.exit_layer)

    def _logits(self, h: Float[Tensor, "B 1 D"], layer: int) -> Float[Tensor, "B V"]:
        return self.model.unembed(h, layer)[:, 0]

    def _last(self, h: Float[Tensor, "B 1 D"]) -> Routed:
        layer = self.model.num_layers
        self.work.heads[layer, len(h)] += 1
        return _at_last_layer(self._logits(h, layer), layer)

    def _step(self, rows: Sequence[int]) -> Step:
        """Return the step of the next token of each row."""
        device = self.model.device
        positions = torch.tensor([[self.lengths[row]] for row in rows], device=device)
        chosen = None if len(rows) == self.batch_size else torch.tensor(rows, device=device)
        return Step(positions=positions, cache=self.cache, rows=chosen)


def _at_last_layer(logits: Float[Tensor, "B V"], layer: int) -> Routed:
    largest = logits.float().softmax(dim=-1).amax(dim=-1)
    layers = [layer] * logits.shape[0]
    return Routed(logits=logits, exit_layers=layers, confidence=largest.tolist())


def forced_exits(
    model: EarlyExitModel,
    input_ids: Int[Tensor, "B T"],
    rule: ExitRule | None,
    *,
    missing_kv: MissingKV = "propagate",
) -> tuple[Float[Tensor, "B T V"], Int[Tensor, "B T"]]:
    """Route the tokens of a given text, one by one, instead of tokens that the model chooses.

    Returns the logits at the exit where each token left, and its exit layer. An evaluation of the
    same text must give the same results.
    """
    batch, length = input_ids.shape
    cache = model.make_cache(batch, length)
    decoder = ExitDecoder(model, cache, batch_size=batch, rule=rule, missing_kv=missing_kv)
    steps = [decoder.decode_one_token(ids, range(batch)) for ids in input_ids.T.tolist()]
    logits = torch.stack([exits.logits for exits in steps], dim=1)
    return logits, torch.tensor([exits.exit_layers for exits in steps]).T
