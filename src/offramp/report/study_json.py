"""How a study's result is stored: the one place where study.json's keys and values are made.

A dataclass becomes an object with a key a field, in the order of the fields; a cost that is a
key is written as short as it can be (``65``), None as null. The fields in ABSENT are left out
where they are None. JSON has no infinity: ``write_json`` writes "inf", which is read as a number.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from offramp.files import write_json
from offramp.reading import read_as
from offramp.report.scale_result import ScaleResult
from offramp.report.study_result import StudyResult, StudyTimes

ABSENT = ("search", "recipe", "to_baseline", "final_to_baseline", "decoding", "source")


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


def write_study(path: Path, result: StudyResult | ScaleResult | StudyTimes) -> None:
    """Write study.json or timing.json, whole or not at all."""
    write_json(path, to_json(result))


def read_study(path: Path) -> StudyResult:
    """The result that a study.json holds; a CheckpointError names what is wrong with it."""
    return read_as(StudyResult, path)


def read_scale(path: Path) -> ScaleResult:
    """The result that a study.json of ``scale`` holds; a CheckpointError names what is wrong."""
    return read_as(ScaleResult, path)


def read_times(path: Path) -> StudyTimes:
    """The times that a timing.json holds; a CheckpointError names what is wrong with it."""
    return read_as(StudyTimes, path)
