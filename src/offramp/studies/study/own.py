"""Studies of one's own: a grid of any fields of a model and of a run, from a TOML file.

The tables ``[model]``, ``[training]`` and ``[specialise]`` hold fields of ``DecoderConfig``,
``TrainConfig`` and ``SpecialiseConfig``. A field with a list of values is varied, and all varied
fields multiply.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from typing import Any, get_args, get_origin, get_type_hints

from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.errors import ConfigError, OfframpError
from offramp.exits.objective import ObjectiveConfig
from offramp.models.native.config import DecoderConfig
from offramp.schema import fitting, shown
from offramp.studies.study.grid_file import GridFile
from offramp.studies.study.plan import Recipe, Study
from offramp.studies.study.studies import GRID
from offramp.training.config import TrainConfig

MOST_RECIPES = 1000
"""Largest number of recipes of a grid."""
NONE = "none"
"""How a file writes the value None."""
_TABLES: dict[str, Any] = {
    "model": DecoderConfig,
    "training": TrainConfig,
    "specialise": SpecialiseConfig,
}
_SET_BY_THE_STUDY = {
    "model": {"vocab_size", "weight_format"},
    "training": {"steps", "epochs", "seed", "patience", "select_at"},
    "specialise": {"seed"},
}
"""Fields that the corpus, ``tokens`` and ``seeds`` decide, or that would make runs unequal."""
_OF_EXITS = ("exit_layers", "exit_head", "kv_source_layer", "upper_intermediate_size")
"""Fields of a model that a static model does not have."""
_FOLLOWS = ("head_dim", "num_key_value_heads", "intermediate_size")
"""Fields of a model that follow from its width and heads unless they are given."""
_OBJECTIVE = {each.name for each in fields(ObjectiveConfig)}
"""Fields of a run that a static model does not have: it trains with the standard loss."""
_ALPHA = re.compile(r"(\w+):([0-9.]+)")


def study_of_grid(grid: GridFile) -> Study:
    """Return the study of a grid: a recipe for each combination of its varied values.

    Static models have the first value of a varied field. Raises ConfigError for a field that does
    not exist, a value that does not fit, and a combination that makes no model.
    """
    given = {table: _varied(table, getattr(grid, table) or {}) for table in _TABLES}
    axes = {
        (table, name): values
        for table, by_name in given.items()
        for name, values in by_name.items()
        if len(values) > 1
    }
    count = math.prod(map(len, axes.values()))
    if count > MOST_RECIPES:
        raise ConfigError(f"expected at most {MOST_RECIPES:,} recipes, got {count:,}")
    first = {table: {name: v[0] for name, v in by.items()} for table, by in given.items()}
    base = _base(first)
    chosen = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    specialised = grid.specialise is not None
    recipes = [_recipe(base, first, each, specialised=specialised) for each in chosen]
    levels, varies = _levels(axes)
    return replace(
        base,
        name=grid.name,
        grid=asdict(grid),
        question=grid.question,
        tokenizer=grid.tokenizer,
        tokens=grid.tokens,
        test_tokens=grid.test_tokens,
        seeds=grid.seeds,
        measures=grid.measures,
        compared_at=grid.compared_at,
        decoding=grid.decoding,
        varies=varies,
        baseline=_baseline(grid.baseline, chosen, recipes),
        static_layers=_static_layers(grid, base),
        shared_static=_shared_static(recipes, base),
        recipes=tuple(
            replace(recipe, level=level) for recipe, level in zip(recipes, levels, strict=True)
        ),
    )


def _varied(table: str, content: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values of each field of a table: one, or those that are varied."""
    known = {each.name for each in fields(_TABLES[table])} - _SET_BY_THE_STUDY[table]
    hints = get_type_hints(_TABLES[table])
    found = {}
    for name, value in content.items():
        if name not in known:
            why = "which the study sets" if name in _SET_BY_THE_STUDY[table] else "no such field"
            raise ConfigError(f"[{table}]: expected fields of it, got {shown(name)}, {why}")
        is_list = any(get_origin(part) is tuple for part in (hints[name], *get_args(hints[name])))
        many = isinstance(value, list) and (not is_list or any(isinstance(v, list) for v in value))
        values = value if many else [value]
        if not values or any(each in values[:at] for at, each in enumerate(values)):
            raise ConfigError(f"{table}.{name}: expected different values, got {shown(value)}")
        if any(isinstance(each, list) for each in values) and not is_list:
            raise ConfigError(f"{table}.{name}: expected values, got {shown(value)}")
        optional = type(None) in get_args(hints[name])
        found[name] = [None if optional and each == NONE else each for each in values]
    return found


def _base(first: Mapping[str, Mapping[str, Any]]) -> Study:
    """Return the study with the first value of each field that static models have, too."""
    training = {name: v for name, v in first["training"].items() if name not in _OBJECTIVE}
    trained = _fitted("training", {**_content(GRID.training), **training})
    model = {name: v for name, v in first["model"].items() if name not in _OF_EXITS}
    full = _fitted("model", {**_small(trained.seq_len), **model, "exit_layers": []})
    return replace(GRID, model=full, training=trained)


def _small(seq_len: int) -> dict[str, Any]:
    """Return the small model of the studies, without exits, for windows of this length."""
    shape = {name: v for name, v in _content(GRID.model).items() if name not in _FOLLOWS}
    positions = max(GRID.model.max_position_embeddings, seq_len)
    return {**shape, "max_position_embeddings": positions, "exit_layers": []}


def _recipe(
    base: Study,
    first: Mapping[str, Mapping[str, Any]],
    chosen: Mapping[tuple[str, str], Any],
    *,
    specialised: bool,
) -> Recipe:
    label = ", ".join(f"{name} {_written(value)}" for (_, name), value in chosen.items())
    values = {
        table: {**first[table], **{n: v for (at, n), v in chosen.items() if at == table}}
        for table in _TABLES
    }
    given = {"loss_weights": TrainConfig.loss_weights, **values["training"]}
    try:
        training = _fitted("training", {**_content(base.training), **given})
        model = _fitted("model", _small(training.seq_len) | values["model"])
        if "exit_layers" not in values["model"]:
            third = max(1, round(model.num_hidden_layers / 3))
            model = replace(model, exit_layers=(third,))
        specialise = _fitted("specialise", values["specialise"]) if specialised else None
        if len(model.exit_layers) == 1:
            raise ConfigError(
                "[model] exit_layers: expected a layer before the last, got "
                f"{shown(values['model'].get('exit_layers', list(model.exit_layers)))}"
            )
    except OfframpError as error:
        raise ConfigError(f"{f'recipe {label}: ' if label else ''}{error}") from None
    own = [name for name in given if name in _OBJECTIVE or ("training", name) in chosen]
    names = [each.name for each in fields(DecoderConfig)]
    changed = {n: getattr(model, n) for n in names if getattr(model, n) != getattr(base.model, n)}
    return Recipe(
        label=label or "recipe",
        training={name: getattr(training, name) for name in own},
        model={"exit_layers": model.exit_layers, **changed},
        specialise=specialise,
    )


def _fitted(table: str, content: Mapping[str, Any]) -> Any:
    try:
        return fitting(_TABLES[table], content)
    except ConfigError as error:
        raise ConfigError(f"[{table}] {error}") from None


def _content(config: Any) -> dict[str, Any]:
    """Return the fields of a config as a file holds them."""
    found = {each.name: getattr(config, each.name) for each in fields(config)}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}


def _written(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, list):
        return " and ".join(map(str, value)) or NONE
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def _levels(
    axes: Mapping[tuple[str, str], Sequence[Any]],
) -> tuple[list[float | None], str | None]:
    """Return the recipes' levels and what they are levels of, where one number is varied."""
    count = math.prod(map(len, axes.values()))
    if len(axes) != 1:
        return [None] * count, None
    ((_, name), values) = next(iter(axes.items()))
    numbers = [_number(name, value) for value in values]
    kinds = {kind for kind, _ in numbers}
    if len(kinds) != 1 or any(number is None for _, number in numbers) or len(values) < 3:
        return [None] * count, None
    return [number for _, number in numbers], kinds.pop()


def _number(name: str, value: Any) -> tuple[str, float | None]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return name, float(value)
    alpha = _ALPHA.fullmatch(value) if isinstance(value, str) and name == "loss_weights" else None
    return (f"the number of {alpha[1]}", float(alpha[2])) if alpha else (name, None)


def _baseline(
    wanted: Mapping[str, Any] | None,
    chosen: Sequence[Mapping[tuple[str, str], Any]],
    recipes: Sequence[Recipe],
) -> str | None:
    if wanted is None:
        return None
    plain = [{name: value for (_, name), value in each.items()} for each in chosen]
    if unknown := sorted({*wanted} - {*plain[0]}):
        expected = ", ".join(plain[0]) or "none, since nothing is varied"
        raise ConfigError(f"baseline: expected varied fields ({expected}), got {shown(unknown[0])}")
    said = {name: None if value == NONE else value for name, value in wanted.items()}
    found = [
        recipe.label
        for recipe, values in zip(recipes, plain, strict=True)
        if all(values[name] == value for name, value in said.items())
    ]
    if len(found) != 1:
        raise ConfigError(f"baseline: expected values of one recipe, got those of {len(found)}")
    return found[0]


def _static_layers(grid: GridFile, base: Study) -> tuple[int, ...]:
    depth = base.model.num_hidden_layers
    layers = tuple(range(1, depth + 1)) if grid.static_layers is None else grid.static_layers
    if depth not in layers or not all(1 <= layer <= depth for layer in layers):
        raise ConfigError(
            f"static_layers: expected layers from 1 to {depth}, with {depth}, got {shown(layers)}"
        )
    return tuple(sorted(set(layers)))


def _shared_static(recipes: Sequence[Recipe], base: Study) -> tuple[tuple[int, int], ...]:
    """Return static models with each source of keys and values of the grid, at full depth."""
    depth = base.model.num_hidden_layers
    sources = {recipe.model.get("kv_source_layer") or depth for recipe in recipes}
    return tuple((depth, source) for source in sorted(sources) if source + 1 < depth)
