"""Turn the keyword arguments of a Python call into a config, and check names and types."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from offramp.errors import ConfigError
from offramp.schema import fitting, shown

Config = TypeVar("Config")
MOST_PROCESSES = 1024
"""Largest number of threads or processes that may be asked for; more would end the process."""


def config_of(
    config: type[Config], options: Mapping[str, Any], *, also: Iterable[str] = ()
) -> Config:
    """Make a config from keyword arguments.

    ``also`` are other names that the caller accepts; they are used only in the hint. Raises
    ConfigError for a name that is not a field, with the nearest name as a hint, and for a value
    whose type is not the field's.
    """
    names = [field.name for field in fields(config)]  # type: ignore[arg-type]
    for name in options:
        if name not in names:
            near = get_close_matches(name, [*names, *also], n=1)
            hint = f"perhaps {near[0]}" if near else f"one of {', '.join([*names, *also])}"
            raise ConfigError(f"{name}: expected the name of an option, {hint}")
    return fitting(config, options)


def exit_layers_of(exits: Iterable[int] | int | None) -> tuple[int, ...] | None:
    """Exit layers as a tuple; a single layer may be given as a number."""
    if exits is None:
        return None
    layers = (exits,) if isinstance(exits, int) else tuple(exits)
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise ConfigError(f"exits: expected a list of whole numbers, got {exits!r}")
    return layers


def refuse_given(why: str, **given: Any) -> None:
    """Raise a ConfigError for an argument that would be ignored."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name}: expected none {why}, got {value!r}"[:300])


def check_processes(**numbers: int | None) -> None:
    """Raise a ConfigError for a number of threads or processes that no machine can start."""
    for name, value in numbers.items():
        if value is not None and not 1 <= value <= MOST_PROCESSES:
            raise ConfigError(f"{name}: expected from 1 to {MOST_PROCESSES}, got {shown(value)}")
