"""Audit tokens that left early: run some of them to the last layer too, and compare.

Which tokens are audited is decided by a coin of its own for every token, before the token runs, so
it depends neither on where the token leaves nor on what the comparison gives. An audit leaves the
text, the cache's later content and the later exits as they are: it runs on copies of what is
pending, and the slots that it fills above the exit are filled anew when a later token needs them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from offramp.errors import ConfigError
from offramp.generation.confident_exit import ExitDecoder
from offramp.generation.deferred import DeferredKV, Segment
from offramp.generation.exits import Exits
from offramp.generation.transfer import on_device
from offramp.models.base import Step
from offramp.models.work import Work


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The last layer's prediction beside that of the exit at which a token left."""

    exit_layer: int
    disagrees: bool
    "Whether the likeliest next token differs."
    nll_gap: float
    """By how many nats the token that is likeliest at the exit is less likely at the last layer
    than that layer's own likeliest token; at least 0, and inf where its logits are not numbers."""


@dataclass(kw_only=True)
class Auditor:
    """Decides which tokens are audited, and tells ``record`` of every token in its order.

    ``record`` is called with whether the token left early, and with the comparison if it was
    audited. ``work`` counts what the audits ran, which is not part of the text's own work.
    """

    share: float
    "Probability with which a token that leaves early is audited, in (0, 1]."
    record: Callable[[bool, Comparison | None], None]
    seed: int | tuple[int, ...] = 0
    "Seed of the coins, which are independent of those of sampling."
    rung: Callable[[int], int] | None = None
    """Returns the rung (ladder.py) of the next token, given how many tokens may leave that are not
    recorded yet. None: tokens leave by the rules of their texts."""
    work: Work = field(default_factory=Work)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"audit: expected a share above 0 and at most 1, got {self.share}")
        seed = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        self._coins = np.random.Generator(np.random.PCG64([*seed, 0xA0D17]))

    def see(self, decoder: ExitDecoder, exits: Exits) -> None:
        """Record the tokens of a step, right after it; audit those whose coin says so."""
        layers, coin, record = decoder.model.num_layers, self._coins.random, self.record
        for place, layer in enumerate(exits.exit_layers):
            audited, left = coin() < self.share, layer < layers
            if left and audited:
                row, logits = exits.rows[place], exits.logits[place]
                record(True, self._compare(decoder, row, layer, logits))
            else:
                record(left, None)

    def _compare(
        self, decoder: ExitDecoder, row: int, exit_layer: int, logits: Float[Tensor, " V"]
    ) -> Comparison:
        full = run_to_the_end(decoder, row, exit_layer, self.work).float()
        early = int(logits.argmax())
        gap = float((full.max() - full[early]).clamp(min=0))
        broken = gap != gap
        return Comparison(
            exit_layer=exit_layer,
            disagrees=broken or early != int(full.argmax()),
            nll_gap=math.inf if broken else gap,
        )


def climbs(auditor: Auditor | None) -> bool:
    """Return whether tokens leave by rungs that an auditor chooses."""
    return auditor is not None and auditor.rung is not None


def decode(
    decoder: ExitDecoder, ids: Sequence[int], rows: Sequence[int], auditor: Auditor | None
) -> Exits:
    """Run the next token of each of ``rows``: see ``ExitDecoder.decode``; record it.

    Rungs are chosen before the step, and its tokens are recorded after it, so those of other rows
    that may leave are pending.
    """
    if auditor is None:
        return decoder.decode(ids, rows)
    if auditor.rung is not None:
        pending = len(decoder.waiting)
        for row in rows:
            pending += decoder.climb(row, auditor.rung(pending))
    exits = decoder.decode(ids, rows)
    auditor.see(decoder, exits)
    return exits


@torch.inference_mode()
def run_to_the_end(
    decoder: ExitDecoder, row: int, exit_layer: int, work: Work
) -> Float[Tensor, " V"]:
    """Return the last layer's logits of a row's last token, which left at ``exit_layer``.

    The keys and values that it reads above the exit are those that a later token of the row would
    read; those of pending tokens are computed as the row's ``missing_kv`` says. Call it right after
    the step of the token.
    """
    routed = decoder.run_on(row, work)
    if routed is not None:
        return routed
    model, cache = decoder.model, decoder.cache
    position = decoder.lengths[row] - 1
    state, waiting = decoder.left_at(row)
    lengths = cache.lengths[:, row].clone()
    ways = [decoder.way_of(n) for n in range(decoder.batch_size)]
    pending = DeferredKV(model, cache, missing_kv=ways, work=work)
    for token in waiting:
        if token.position != position:
            pending.defer(token.layer, row, token.state, token.position)
    h = state[None, None]
    places = on_device([position], model.device)[:, None]
    step = Step(positions=places, cache=cache, rows=decoder.rows_of(row), end=position + 1)
    start = exit_layer
    for stop in model.exit_layers:
        if stop > start:
            _, h = pending.run(
                Segment(h=h, start=start, stop=stop, rows=[row], positions=[position], step=step)
            )
            start = stop
    work.heads[start, 1] += 1
    cache.lengths[:, row] = lengths
    found: Tensor = model.unembed(h, start)[0, 0]
    return found
