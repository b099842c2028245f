"""Confident exit: each token leaves at the first exit that is sure of it.

A token that left at layer e has no keys and values above e. They are owed until a later token
of its row goes deeper; then, before that token runs the layers to the next exit,

- ``propagate`` projects them there from the state at the exit (Elbayad et al. 2020; CALM), by
  the products that give the later token its own where those are at hand,
- ``recompute`` runs those layers for all tokens that owe them, together with the later token.

Either way one call serves every token that owes, and those that nobody looks back at cost
nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from offramp.exits.confidence import Agreement, Confidence, ExitView, confidence_named
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.config import MissingKV
from offramp.models.base import FEW_TOKENS, EarlyExitModel, Step, fills_beside
from offramp.models.kv_cache import KVCache
from offramp.models.work import Work

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype("float32"),
    torch.float64: np.dtype("float64"),
}


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """A policy and the measure of confidence that it reads."""

    policy: ThresholdPolicy | GainPolicy
    confidence: str = "max_prob"
    fitted: FittedExits = NOTHING_FITTED

    @property
    def measure(self) -> Confidence:
        """The measure itself."""
        return confidence_named(self.confidence)

    def ask(
        self, index: int, view: ExitView, positions: list[int]
    ) -> tuple[list[float], list[bool]]:
        """Of each token at the ``index``-th exit its confidence, and whether it leaves."""
        scores = self.measure.score(view)
        said: list[float] = scores.tolist()
        if isinstance(self.policy, GainPolicy):
            return said, self.policy.leaves(index, view.expected_kl).tolist()
        if self.policy.decay:
            return said, self.policy.leaves(index, scores, torch.tensor(positions)).tolist()
        bound = float(self.policy.bound(index, _NUMPY[scores.dtype]))  # in the scores' precision
        return said, [score >= bound for score in said]


@dataclass(frozen=True, kw_only=True)
class Exits:
    """Where one token of each row left, and what its exit says of the next token."""

    logits: Float[Tensor, "B V"]
    exit_layers: list[int]
    confidence: list[float]
    "At the exit where the token left; at the last layer its largest probability."


@dataclass
class _Owing:
    """A row's tokens that owe keys and values above an exit: their states (D,) there."""

    states: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)


class ExitDecoder:
    """Decodes one token of each row at a time; each row leaves where it is sure.

    ``rule`` None is full depth. ``work`` counts what new tokens took, deferred fills included.
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
        self.model, self.cache = model, cache
        self.rule, self.missing_kv = rule, missing_kv
        self.batch_size, self.lengths = batch_size, [0] * batch_size
        self.work = Work()
        self.drafted = self.accepted = 0  # nothing is
        self.exits = model.exit_layers if rule else (model.num_layers,)
        self._owing = {exit: [_Owing() for _ in range(batch_size)] for exit in self.exits[:-1]}

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Exits:
        """Run the prompts at full depth; rows are padded on the left."""
        model, width = self.model, max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        real = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            real[row, width - len(prompt) :] = True
        self.lengths = [len(prompt) for prompt in prompts]
        step = Step(
            positions=(real.cumsum(dim=1) - 1).clamp(min=0).to(model.device),
            real=None if bool(real.all()) else real.to(model.device),
            cache=self.cache,
        )
        h = model.embed(ids.to(model.device), step=step)
        h = model.run_layers(h, 0, model.num_layers, step=step)
        return _at_last_layer(model.unembed(h[:, -1:], model.num_layers)[:, 0], model.num_layers)

    @torch.inference_mode()
    def decode_one_token(self, ids: Sequence[int], rows: Sequence[int]) -> Exits:
        """The next token of each of ``rows``, ascending, runs until it leaves."""
        step = self._step(rows)
        h = self.model.embed(torch.tensor(ids, device=self.model.device)[:, None], step=step)
        if self.rule is None:
            h = self._run(h, 0, self.model.num_layers, step=step)
            exits = self._last(h)
        else:
            exits = self._route(h, list(rows), self.rule, step)
        for row in rows:
            self.lengths[row] += 1
        return exits

    def _route(
        self, h: Float[Tensor, "B 1 D"], rows: list[int], rule: ExitRule, step: Step
    ) -> Exits:
        """Run from exit to exit with the rows that go on."""
        left: dict[int, tuple[Tensor, int, float]] = {}  # by row: logits, exit layer, confidence
        going, before, agreement = list(rows), 0, None
        for index, layer in enumerate(self.exits[:-1]):
            previous, h = self._to_exit(h, before, layer, going, step)
            before = layer
            unembed = partial(self._unembed, h, layer, asked=True)
            view = ExitView(
                exit_layer=layer,
                logits=unembed,
                state=h[:, 0],
                previous_state=previous[:, 0],
                earlier=agreement,
                fitted=rule.fitted,
            )
            places = [self.lengths[row] for row in going]
            scores, leaving = rule.ask(index, view, places)
            self.work.questions[layer, len(going)] += 1
            if any(leaving):
                out = [i for i, leaves in enumerate(leaving) if leaves]
                on = [i for i, leaves in enumerate(leaving) if not leaves]
                if not rule.measure.needs_head:
                    logits = self._unembed(h[out] if on else h, layer)
                else:
                    logits = view.logits[out] if on else view.logits
                for n, i in enumerate(out):
                    at = logits[n]
                    left[going[i]] = (at, layer, scores[i])
                    owing = self._owing[layer][going[i]]
                    owing.states.append(h[i, 0])
                    owing.positions.append(places[i])
                if not on:
                    break
                h, going = h[on], [going[i] for i in on]
                step = self._step(going)
            else:
                on = list(range(len(going)))
            if rule.confidence == "patience":
                agreement = Agreement(*(part[on] for part in view.agreement))
        else:
            _, h = self._to_exit(h, before, self.exits[-1], going, step)
            last = self._last(h)
            for row, *found in zip(
                going, last.logits, last.exit_layers, last.confidence, strict=True
            ):
                left[row] = (found[0], found[1], found[2])
        ordered = [left[row] for row in rows]
        return Exits(
            logits=torch.stack([found[0] for found in ordered])
            if len(rows) > 1
            else ordered[0][0][None],
            exit_layers=[layer for _, layer, _ in ordered],
            confidence=[score for _, _, score in ordered],
        )

    def _to_exit(
        self, h: Float[Tensor, "B 1 D"], start: int, stop: int, rows: list[int], step: Step
    ) -> tuple[Tensor, Tensor]:
        """The rows' tokens from one exit to the next, after what others owe there.

        Returns the states one block before the exit, if the measure needs them, and at it.
        """
        owing = [row for row in rows if start and self._owing[start][row].states]
        owed = sum(len(self._owing[start][row].states) for row in owing)
        propagate = bool(owed) and self.missing_kv == "propagate"
        if propagate:
            self.work.keys_values[owed] += stop - start
        if propagate and not fills_beside(self.model, owed + len(rows)):
            states, before = self._joined(start, owing)
            self.model.project_kv(states, start, stop, step=before)
            self._hand_on(start, stop, owing, states.flatten(0, 1))
            owed = 0
        active = None
        if owed:
            h, step = self._joined(start, owing, h, rows)
            if propagate:
                places = torch.arange(owed + len(rows), device=h.device)
                active = (places >= owed).view(h.shape[:2])
        portions = _portions(h, step) if owed else [(h, step)]
        ran = [self._ran(part, start, stop, step=at, active=active) for part, at in portions]
        previous, h = (
            torch.cat(states) if len(ran) > 1 else states[0] for states in zip(*ran, strict=True)
        )
        if owed:  # a token a row again, what was owed first
            h, previous = h.reshape(-1, 1, h.shape[-1]), previous.reshape(-1, 1, h.shape[-1])
            self._hand_on(start, stop, owing, h[:owed, 0])
        return previous[owed:], h[owed:]

    def _hand_on(self, start: int, stop: int, owing: list[int], states: Tensor) -> None:
        """What is not owed from ``start`` any more is owed from ``stop``, unless that is the end.

        ``states`` are the tokens' there: under ``propagate`` those that they left with.
        """
        done = 0
        for row in owing:
            before, owed = self._owing[start][row], len(self._owing[start][row].states)
            if stop in self._owing:
                self._owing[stop][row].states += list(states[done : done + owed])
                self._owing[stop][row].positions += before.positions
            done += owed
            self._owing[start][row] = _Owing()

    def _joined(
        self, start: int, owing: list[int], h: Tensor | None = None, rows: Sequence[int] = ()
    ) -> tuple[Tensor, Step]:
        """The states of all tokens that are owed from ``start``, then those of ``rows`` (h).

        In a batch each token is a row of its own, (N, 1, D); else they are one row, (1, N, D).
        """
        owed = [self._owing[start][row] for row in owing]
        states = [state for part in owed for state in part.states]
        places = [place for part in owed for place in part.positions]
        owners = [row for row, part in zip(owing, owed, strict=True) for _ in part.states]
        if h is not None:
            states += list(h[:, 0])
            places += [self.lengths[row] for row in rows]
            owners += rows
        joined, positions = torch.stack(states), torch.tensor(places, device=self.model.device)
        if self.batch_size == 1:
            return joined[None], Step(positions=positions[None], cache=self.cache)
        whose = torch.tensor(owners, device=self.model.device)
        return joined[:, None], Step(positions=positions[:, None], cache=self.cache, rows=whose)

    def _ran(
        self, h: Tensor, start: int, stop: int, *, step: Step, active: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The states one block before ``stop``, if the measure needs them, and there."""
        cut = stop - 1 if self.rule and self.rule.measure.needs_previous_state else start
        previous = self._run(h, start, cut, step=step, active=active) if cut > start else h
        return previous, self._run(previous, cut, stop, step=step, active=active)

    def _run(
        self,
        h: Float[Tensor, "B T D"],
        start: int,
        stop: int,
        *,
        step: Step,
        active: Bool[Tensor, "B T"] | None = None,
    ) -> Tensor:
        running = h.shape[0] * h.shape[1] if active is None else int(active.sum())
        self.work.blocks[running] += stop - start
        return self.model.run_layers(h, start, stop, step=step, active=active)

    def _unembed(
        self, h: Float[Tensor, "B 1 D"], layer: int, *, asked: bool = False
    ) -> Float[Tensor, "B V"]:
        if not asked:
            self.work.heads[layer, len(h)] += 1
        return self.model.unembed(h, layer)[:, 0]

    def _last(self, h: Float[Tensor, "B 1 D"]) -> Exits:
        layer = self.model.num_layers
        return _at_last_layer(self._unembed(h, layer), layer)

    def _step(self, rows: Sequence[int]) -> Step:
        """Where the next token of each row stands."""
        device = self.model.device
        positions = torch.tensor([[self.lengths[row]] for row in rows], device=device)
        chosen = None if len(rows) == self.batch_size else torch.tensor(rows, device=device)
        return Step(positions=positions, cache=self.cache, rows=chosen)


def _portions(h: Float[Tensor, "B T D"], step: Step) -> Iterator[tuple[Tensor, Step]]:
    """Rows in portions, in order: a row of the cache may be copied for each that reads it.

    A token sees those of its row that stand before it, which are in its portion or an earlier.
    """
    if step.rows is None or len(h) <= FEW_TOKENS:
        yield h, step
        return
    for first in range(0, len(h), FEW_TOKENS):
        part = slice(first, first + FEW_TOKENS)
        at = Step(positions=step.positions[part], cache=step.cache, rows=step.rows[part])
        yield h[part], at


def _at_last_layer(logits: Float[Tensor, "B V"], layer: int) -> Exits:
    sure = logits.float().softmax(dim=-1).amax(dim=-1)
    layers = [layer] * logits.shape[0]
    return Exits(logits=logits, exit_layers=layers, confidence=sure.tolist())


def forced_exits(
    model: EarlyExitModel,
    input_ids: Int[Tensor, "B T"],
    rule: ExitRule | None,
    *,
    missing_kv: MissingKV = "propagate",
) -> tuple[Float[Tensor, "B T V"], Int[Tensor, "B T"]]:
    """Force the router along a text: decode it token by token, whatever the exits say.

    Returns the logits at the exit where each token left, and its exit layer: what an evaluation
    of the same text must equal.
    """
    batch, length = input_ids.shape
    cache = model.make_cache(batch, length)
    decoder = ExitDecoder(model, cache, batch_size=batch, rule=rule, missing_kv=missing_kv)
    steps = [decoder.decode_one_token(ids, range(batch)) for ids in input_ids.T.tolist()]
    logits = torch.stack([exits.logits for exits in steps], dim=1)
    return logits, torch.tensor([exits.exit_layers for exits in steps]).T
