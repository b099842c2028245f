"""Tokens that run between exits, and where they left."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.errors import GenerationError
from offramp.generation.sampling import Likeliest, likeliest_with
from offramp.models.base import Step

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Exits:
    """Where one token of each of some rows left, and the logits of the next token there."""

    rows: list[int]
    logits: Float[Tensor, "B V"]
    exit_layers: list[int]
    confidence: list[float]
    "The confidence at the exit where the token left; at the last layer, its largest probability."
    likeliest: list[Likeliest] | None = None
    "The largest of each row's logits and its token id; None if they were not looked for."
    errors: dict[int, GenerationError] = field(default_factory=dict)
    "By row: why a token has no confidence. Such a row is not one of ``rows``."


class Left(NamedTuple):
    """Where one token left."""

    logits: Float[Tensor, " V"]
    exit_layer: int
    confidence: float


@dataclass(kw_only=True)
class Running:
    """The tokens that run in a step, one of each row, and the layer that they are at."""

    h: Float[Tensor, "B 1 D"]
    rows: list[int]
    step: Step
    layer: int = 0


def by_identity(values: Sequence[T], rows: Sequence[int]) -> Iterable[tuple[T, list[int]]]:
    """Return each value that rows have, ``values[row]``, with the places in ``rows`` that do."""
    found: dict[int, tuple[T, list[int]]] = {}
    for place, row in enumerate(rows):
        found.setdefault(id(values[row]), (values[row], []))[1].append(place)
    return found.values()


def joined(left: dict[int, Left], last: Exits | None, errors: dict[int, GenerationError]) -> Exits:
    """Return all tokens that left in a step, by row: early ones, and those at the last layer."""
    if last is not None:
        if not left:
            return replace(last, errors=errors) if errors else last
        at_last = zip(last.logits, last.exit_layers, last.confidence, strict=True)
        left = left | {row: Left(*each) for row, each in zip(last.rows, at_last, strict=True)}
    rows = sorted(left)
    found = [left[row] for row in rows]
    if len(found) == 1:
        logits = found[0].logits[None]  # without a copy
    else:
        logits = torch.stack([each.logits for each in found]) if found else torch.empty(0, 0)
    likeliest = likeliest_with(logits)[0] if found else None
    return Exits(
        rows=rows,
        logits=logits,
        exit_layers=[each.exit_layer for each in found],
        confidence=[each.confidence for each in found],
        likeliest=likeliest,
        errors=errors,
    )


def both(one: Exits, other: Exits) -> Exits:
    """Return the tokens of two parts of a step, by row."""
    left = {
        row: Left(*each)
        for part in (one, other)
        for row, *each in zip(
            part.rows, part.logits, part.exit_layers, part.confidence, strict=True
        )
    }
    return joined(left, None, one.errors | other.errors)


def at_last_layer(logits: Float[Tensor, "B V"], rows: list[int], layer: int) -> Exits:
    """Return tokens that left at the last layer."""
    largest = logits.float().softmax(dim=-1).amax(dim=-1)
    likeliest, [confidence] = likeliest_with(logits, largest)
    return Exits(
        rows=rows,
        logits=logits,
        exit_layers=[layer] * len(rows),
        confidence=confidence,
        likeliest=likeliest,
    )
