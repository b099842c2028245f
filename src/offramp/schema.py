"""Check that outside values fit a type: keyword arguments, and what a file holds.

The type is a dataclass or a ``msgspec.Struct``, and its fields are the schema: what is no field
is refused, what is missing has a default or is refused, and ``__post_init__`` checks the rest.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from offramp.errors import ConfigError

Value = TypeVar("Value")
_LARGEST = 1 << 63
_SHOWN = 80  # characters of a wrong value
_WORDS = {int: "whole number", float: "number", str: "string", Mapping: "object", dict: "object"}
_PLACE = re.compile(r"\.?([^.\[\]]+)|\[([^\]]*)\]")


def fitting(type_: type[Value], content: Any, *, foreign: bool = False) -> Value:
    """Return the value of ``type_`` with this content, which is as JSON holds it.

    The strings "inf" and "-inf" stand for numbers where a number is expected. ``foreign`` content
    may have other fields, too. Raises ConfigError, which names the field, what is expected and
    what was found.
    """
    if foreign and isinstance(content, Mapping):
        content = {name: content[name] for name in _names(type_) if name in content}
    try:
        for place, number in _numbers(content):
            if not foreign and number != number:
                raise ConfigError(f"{place}: expected a number, got nan")
            if isinstance(number, int) and abs(number) >= _LARGEST:
                raise ConfigError(f"{place}: expected a number below 2^63, got {shown(number)}")
        try:
            value = msgspec.convert(content, type_, str_keys=True)
        except msgspec.ValidationError:
            content = _with_infinity(type_, content)
            value = msgspec.convert(content, type_, str_keys=True)
    except msgspec.ValidationError as error:
        raise ConfigError(_sentence(type_, content, error)) from None
    except (ArithmeticError, RecursionError) as error:
        raise ConfigError(f"expected numbers of a usable size, got: {error}") from None
    if not foreign and (unknown := next(_unknown(value, content), None)):
        raise ConfigError(f"{unknown}: expected no such field")
    return value


def shown(value: Any) -> str:
    """Return a wrong value for a message, on one line and cut where it is long."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"one of about {int(abs(value).bit_length() * math.log10(2)) + 1} digits"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def named(hint: Any) -> str:
    """Return a type in words, such as "a number or None"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(named(part) for part in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if _is_a(hint, Mapping):
        return "an object"
    if _is_a(hint, Sequence) and arguments:
        member = named(arguments[0]).removeprefix("an ").removeprefix("a ")
        return f"a list of {member}s" if member in _WORDS.values() else "a list"
    if hint in (NoneType, bool):
        return "None" if hint is NoneType else "True or False"
    if is_dataclass(hint) or origin is not None or _is_struct(hint) or hint in (Mapping, dict):
        return "an object"
    return f"a {_WORDS.get(hint, getattr(hint, '__name__', str(hint)))}"


def _sentence(type_: Any, content: Any, error: msgspec.ValidationError) -> str:
    said, _, place = str(error).partition(" - at `")
    key, _, rest = place.partition("` in `")
    at = _PLACE.findall((rest or key).removeprefix("$").removesuffix("`"))
    keys = [name if name else (index if index == "..." else int(index)) for name, index in at]
    where = "".join(
        f".{each}" if isinstance(each, str) and each != "..." else f"[{each}]" for each in keys
    ).removeprefix(".")
    if isinstance(error.__cause__, ValueError | TypeError):  # of a __post_init__
        return f"{where}.{error.__cause__}" if where else str(error.__cause__)
    if "missing required field" in said:
        name = said.split("`")[1]
        expected = named(_type_at(type_, [*keys, name]))
        return f"{where}.{name}: expected {expected}, but it is missing".removeprefix(".")
    prefix = f"{where}: " if where else ""
    if rest:
        return f"{prefix}expected keys of another kind"
    found = content
    for each in keys:
        try:
            found = found[each]
        except (LookupError, TypeError):
            return f"{prefix}expected {named(_type_at(type_, keys))}"
    return f"{prefix}expected {named(_type_at(type_, keys))}, got {shown(found)}"


def _type_at(type_: Any, keys: Sequence[str | int]) -> Any:
    """Return the type of a part of a type, by the path to it."""
    for key in keys:
        for part in get_args(type_) if get_origin(type_) in (Union, UnionType) else (type_,):
            if is_dataclass(part) or _is_struct(part) or get_origin(part) is not None:
                type_ = part
        arguments = get_args(type_)
        if is_dataclass(type_) or _is_struct(type_):
            type_ = _hints(type_).get(str(key), Any)
        elif not arguments or get_origin(type_) is Literal:
            return Any
        else:
            positional = get_origin(type_) is tuple and arguments[-1] is not Ellipsis
            if positional and isinstance(key, int) and key < len(arguments):
                type_ = arguments[key]
            else:
                type_ = arguments[-1 if _is_a(type_, Mapping) else 0]
    return type_


@cache
def _hints(type_: Any) -> dict[str, Any]:
    return get_type_hints(type_)


def _names(type_: Any) -> tuple[str, ...]:
    if _is_struct(type_):
        return tuple(type_.__struct_fields__)
    return tuple(field.name for field in fields(type_))


def _is_a(type_: Any, kind: type) -> bool:
    origin = get_origin(type_)
    return isinstance(origin, type) and issubclass(origin, kind)


def _is_struct(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def _parts(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parts of a mapping or a sequence, with their keys."""
    if isinstance(content, Mapping):
        yield from content.items()
    elif isinstance(content, list | tuple):
        yield from enumerate(content)


def _numbers(content: Any, place: str = "") -> Iterator[tuple[str, int | float]]:
    if isinstance(content, int | float):
        yield place, content
    for key, part in _parts(content):
        yield from _numbers(part, f"{place}.{key}".removeprefix("."))


def place_of_infinity(content: Any) -> str | None:
    """Return where the content of a file has a number that is not finite; None if nowhere.

    JSON has no such numbers, and offramp writes "inf" for infinity.
    """
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        place, part = waiting.pop()
        if isinstance(part, float) and not math.isfinite(part):
            return place.removeprefix(".")
        of_list = isinstance(part, list | tuple)
        waiting += [(f"{place}[{k}]" if of_list else f"{place}.{k}", v) for k, v in _parts(part)]
    return None


def _with_infinity(type_: Any, content: Any) -> Any:
    if isinstance(content, str) and content in ("inf", "-inf"):
        return float(content) if float in (type_, *get_args(type_)) else content
    if isinstance(content, Mapping | list | tuple):
        parts = {key: _with_infinity(_type_at(type_, [key]), part) for key, part in _parts(content)}
        return parts if isinstance(content, Mapping) else list(parts.values())
    return content


def _unknown(value: Any, content: Any, place: str = "") -> Iterator[str]:
    """Yield the places in the content that are in no field of the value."""
    has_fields = is_dataclass(value) or isinstance(value, msgspec.Struct)
    members = dict(_parts(content))
    if has_fields:
        held = {name: getattr(value, name) for name in _names(type(value))}
        yield from (f"{place}.{key}".removeprefix(".") for key in members if key not in held)
        pairs = [(key, held[key], part) for key, part in members.items() if key in held]
    else:  # the keys may be numbers now; the order is the same
        pairs = [
            (key, own, part)
            for (key, part), (_, own) in zip(members.items(), _parts(value), strict=False)
        ]
    for key, own, part in pairs:
        yield from _unknown(own, part, f"{place}.{key}".removeprefix("."))
