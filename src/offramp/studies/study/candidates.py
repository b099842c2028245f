"""What ``offramp recipe`` tries: candidates, and the rounds in which they are changed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.models.head_kinds import ExitHeadKind
from offramp.models.native.config import DecoderConfig
from offramp.studies.study.plan import Recipe

SCHEDULES: tuple[dict[str, Any], ...] = (
    {"loss_weights": "asymmetric_exits:0.3"},
    *(
        {"loss_weights": "asymmetric_exits:0.9", "alpha_end": end, "alpha_schedule": "cosine"}
        for end in (0.3, 0.1)
    ),
)
"""Ways to weigh the early exits during a run, as fields of TrainConfig: alpha, the weight of all
of them together, is constant or falls."""

UPPER = "hidden units above the source"
"""Name of the round that is left out if all of the best candidate's blocks project keys."""

ADDED = "exits added after training"
"""Name of the round that is left out if the best candidate's exits are not specialised."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe of the search."""

    exits: tuple[int, ...]
    "Layers of the early exits."
    source: int | None = None
    "The layer above which the blocks share keys and values; None: each block has its own."
    upper: int | None = None
    """Hidden units of the blocks that project no keys and values; None: as of all blocks. Without a
    source there are no such blocks, and it does not count."""
    head: ExitHeadKind = "adapter"
    training: Mapping[str, Any] = field(default_factory=lambda: SCHEDULES[-1])
    "Fields of TrainConfig."
    specialise: SpecialiseConfig | None = None
    """How to specialise the exits after training; None: they stay as trained. In a round the
    budget is in percent of the standard model's FLOPs; ``budgets`` converts it for a run."""
    add: tuple[int, ...] = ()
    "Layers of exits that are added when the others are specialised."

    def changed(self, **changes: Any) -> "Candidate":
        """The candidate with other values."""
        return replace(self, **changes)

    @property
    def all_exits(self) -> tuple[int, ...]:
        """Layers of its early exits in the end."""
        return tuple(sorted({*self.exits, *self.add}))

    @property
    def model(self) -> dict[str, Any]:
        """The fields of DecoderConfig that it changes."""
        return {"exit_layers": self.exits, "exit_head": self.head, **self.shared}

    @property
    def shared(self) -> dict[str, Any]:
        """Those of them that say how blocks share keys and values."""
        if self.source is None:
            return {}
        upper = {} if self.upper is None else {"upper_intermediate_size": self.upper}
        return {"kv_source_layer": self.source, **upper}

    @property
    def recipe(self) -> Recipe:
        """The candidate as a recipe of a study."""
        exits, added = (",".join(map(str, layers)) for layers in (self.exits, self.add))
        specialise = self.specialise and replace(self.specialise, add_exits=self.add)
        return Recipe(
            label=", ".join(
                ([] if self.source is None else [f"source {self.source}"])
                + ([f"upper {self.upper}"] if self.source and self.upper else [])
                + [f"exit {exits}", f"head {self.head}"]
                + [f"{name} {value}" for name, value in self.training.items()]
                + (["specialised"] if specialise else [])
                + ([f"exit {added} added"] if specialise and added else [])
            ),
            training=self.training,
            model=self.model,
            specialise=specialise,
        )


def first_candidate(layers: int) -> Candidate:
    """Where the search begins: what an earlier search found for models of six layers.

    Exits after a third of the layers and after half of that, with adapters, and an alpha that
    falls from 0.9 to 0.1.
    """
    third = _part(layers, 3)
    return Candidate(exits=_distinct(third // 2, third))


def freed_units(model: DecoderConfig) -> int:
    """Hidden units that a block of a model can have without a projection of keys and values.

    They are its own and those that cost no more than the projection: a hidden unit takes three
    rows of the width, a number of a key or a value takes one.
    """
    assert model.head_dim is not None
    assert model.num_key_value_heads is not None
    return model.units(0) + 2 * model.num_key_value_heads * model.head_dim // 3


def rounds(layers: int, budget: float, *, upper: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rounds of the search: a name, and the changes to the best candidate so far to try.

    ``budget`` is in percent of the standard model's FLOPs. ``upper`` is the number of hidden units
    to try in blocks that project no keys and values.
    """
    third, half = _part(layers, 3), _part(layers, 2)
    sources = _distinct(1, _part(layers, 6), third, half)
    placed = [(third // 2, third), (third // 2,), (third,), (third // 2, third, half)]
    exits = dict.fromkeys(_distinct(*each) for each in placed)
    yield "source of keys and values", [{"source": source} for source in (None, *sources)]
    yield UPPER, [{"upper": each} for each in (None, upper)]
    yield "exits", [{"exits": each} for each in exits]
    yield "schedule", [{"training": training} for training in SCHEDULES]
    yield "head", [{"head": head} for head in ("adapter", "norm")]
    specialised = SpecialiseConfig(compute_budget=budget, missing_kv="propagate")
    yield "specialise", [{"specialise": each} for each in (None, specialised)]
    yield ADDED, [{"add": ()}, *({"add": (layer,)} for layer in _distinct(*placed[-1]))]


def _part(layers: int, parts: int) -> int:
    """The layer after that part of the blocks."""
    return max(1, round(layers / parts))


def _distinct(*layers: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, layer) for layer in layers}))
