"""Turn the keyword arguments of a Python call into a config, and check names and types."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from offramp.errors import ConfigError

Config = TypeVar("Config")
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    NoneType: "None",
}


def config_of(
    config: type[Config], options: Mapping[str, Any], *, also: Iterable[str] = ()
) -> Config:
    """Make a config from keyword arguments.

    ``also`` are other names that the caller accepts; they are used only in the hint. Raises
    ConfigError for a name that is not a field, with the nearest name as a hint, and for a value
    whose type is not the field's.
    """
    names = [field.name for field in fields(config)]  # type: ignore[arg-type]
    hints = get_type_hints(config)
    checked: dict[str, Any] = {}
    for name, value in options.items():
        if name not in names:
            near = get_close_matches(name, [*names, *also], n=1)
            hint = f"perhaps {near[0]}" if near else f"one of {', '.join([*names, *also])}"
            raise ConfigError(f"{name}: expected the name of an option, {hint}")
        checked[name] = tuple(value) if isinstance(value, list) else value
        if not _fits(checked[name], hints[name]):
            raise ConfigError(f"{name}: expected {_named(hints[name])}, got {value!r}")
        if hints[name] is float:
            checked[name] = _as_float(name, value)
    return config(**checked)


def _as_float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        raise ConfigError(f"{name}: expected a number below 1e308, got a larger one") from None


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the type of a config's field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(part, arguments[0]) for part in value)
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def _named(hint: Any) -> str:
    """Return a type in words, such as "a number or None"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_named(part) for part in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list of {_named(arguments[0]).removeprefix('a ')}s"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
