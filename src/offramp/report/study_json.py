"""How a study's result is stored: the one place where study.json's keys and values are made.

A dataclass becomes an object with a key a field, in the order of the fields; a cost that is a
key is written as short as it can be (``65``), None as null. The fields in ABSENT are left out
where they are None. JSON has no infinity: ``write_json`` writes "inf", read here as a number.
"""

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from offramp.errors import CheckpointError
from offramp.files import read_json, write_json
from offramp.report.study_result import StudyResult, StudyTimes

ABSENT = ("search", "recipe", "to_baseline", "final_to_baseline")


def to_json(value: Any) -> Any:
    """A result, or a part of one, as JSON holds it."""
    if is_dataclass(value):
        members = {field.name: getattr(value, field.name) for field in fields(value)}
        return {
            name: to_json(member)
            for name, member in members.items()
            if not (member is None and name in ABSENT)
        }
    if isinstance(value, Mapping):
        return {
            f"{key:g}" if isinstance(key, float) else str(key): to_json(member)
            for key, member in value.items()
        }
    return [to_json(member) for member in value] if isinstance(value, list | tuple) else value


def from_json(type_: Any, content: Any) -> Any:
    """The value of that type; KeyError, TypeError or ValueError where the content is another's."""
    origin, parameters = get_origin(type_), get_args(type_)
    if type_ is Any:
        return content
    if is_dataclass(type_):
        hints = typing.get_type_hints(type_)
        return typing.cast("type[Any]", type_)(
            **{
                field.name: from_json(hints[field.name], content[field.name])
                for field in fields(type_)
                if not (field.name in ABSENT and field.name not in content)
            }
        )
    if origin is types.UnionType:  # X | None
        return None if content is None else from_json(parameters[0], content)
    if origin is tuple:
        members = parameters[:1] * len(content) if parameters[-1] is Ellipsis else parameters
        return tuple(from_json(of, part) for of, part in zip(members, content, strict=True))
    if origin is not None:  # a mapping
        key, member = parameters
        return {key(name): from_json(member, part) for name, part in content.items()}
    if content is None:
        raise TypeError(f"expected {type_.__name__}, got null")
    return type_(content)


def write_study(path: Path, result: StudyResult | StudyTimes) -> None:
    """Write study.json or timing.json, whole or not at all."""
    write_json(path, to_json(result))


def read_study(path: Path) -> StudyResult:
    """The result that a study.json holds; a CheckpointError names what is wrong with it."""
    return study_of(read_json(path), str(path))


def read_times(path: Path) -> StudyTimes:
    """The times that a timing.json holds; a CheckpointError names what is wrong with it."""
    times: StudyTimes = _checked(StudyTimes, read_json(path), str(path))
    return times


def study_of(content: Any, name: str = "file") -> StudyResult:
    """The result with that content of a study.json; ``name`` is for the CheckpointError."""
    result: StudyResult = _checked(StudyResult, content, name)
    return result


def _checked(type_: Any, content: Any, name: str) -> Any:
    try:
        return from_json(type_, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{name}: expected a file of this version's offramp study, got one with {said}"
        ) from None
