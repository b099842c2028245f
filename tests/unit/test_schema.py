"""What comes from outside fits its type, or the sentence names the field."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import pytest

from offramp.errors import ConfigError
from offramp.schema import fitting, named, shown


@dataclass(frozen=True, kw_only=True)
class Part:
    count: int
    rate: float = 1.0
    layers: tuple[int, ...] = ()
    kind: Literal["pre", "post"] = "pre"
    name: str | None = None
    by_layer: Mapping[int, float] = field(default_factory=dict)
    pairs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"count: expected at least 0, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class Whole:
    part: Part
    parts: Sequence[Part] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


class Foreign(msgspec.Struct):
    count: int
    layers: list[int] | None = None


def nested(depth: int) -> Any:
    content: Any = {}
    for _ in range(depth):
        content = {"x": [content]}
    return content


def test_content_becomes_a_value_with_every_part_of_its_own_type():
    content = {
        "part": {"count": 1, "rate": 2, "layers": [1, 2], "by_layer": {"2": "inf"}, "name": "inf"},
        "parts": [{"count": 3, "pairs": [[1, 2]]}],
        "about": {"any": [{"thing": "inf"}]},
    }
    value = fitting(Whole, content)
    assert value.part == Part(count=1, rate=2.0, layers=(1, 2), by_layer={2: math.inf}, name="inf")
    assert value.parts == [Part(count=3, pairs=((1, 2),))]
    assert value.about == content["about"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "expected an object, got []"),
        (None, "expected an object, got None"),
        ({}, "part: expected an object, but it is missing"),
        ({"part": {}}, "part.count: expected a whole number, but it is missing"),
        ({"part": {"count": "1"}}, "part.count: expected a whole number, got '1'"),
        ({"part": {"count": True}}, "part.count: expected a whole number, got True"),
        ({"part": {"count": 1.5}}, "part.count: expected a whole number, got 1.5"),
        ({"part": {"count": None}}, "part.count: expected a whole number, got None"),
        ({"part": {"count": -1}}, "part.count: expected at least 0, got -1"),
        ({"part": {"count": 2**63}}, "part.count: expected a number below 2^63, got 9223"),
        ({"part": {"count": 10**5000}}, "part.count: expected .* below 2^63, got .* 5001 digits"),
        ({"part": {"count": 1, "rate": math.nan}}, "part.rate: expected a number, got nan"),
        ({"part": {"count": 1, "layers": 3}}, "part.layers: expected a list of whole numbers, got"),
        ({"part": {"count": 1, "layers": ["a"]}}, "part.layers[0]: expected a whole number, got"),
        ({"part": {"count": 1, "kind": "x"}}, "part.kind: expected 'pre' or 'post', got 'x'"),
        ({"part": {"count": 1, "kind": [1]}}, "part.kind: expected 'pre' or 'post', got [1]"),
        ({"part": {"count": 1, "name": 7}}, "part.name: expected a string or None, got 7"),
        ({"part": {"count": 1, "by_layer": {"x": 1}}}, "part.by_layer: expected keys of another"),
        ({"part": {"count": 1, "by_layer": {"1": "x"}}}, "part.by_layer[...]: expected a number"),
        ({"part": {"count": 1, "pairs": [[1]]}}, "part.pairs[0]: expected a list"),
        ({"part": {"count": 1}, "parts": [{"count": 1, "no": 2}]}, "parts.0.no: expected no such"),
        ({"part": {"count": 1}, "more": 1}, "more: expected no such field"),
        ({"part": {"count": 1, "name": "a\x1b[2J"}, "about": 3}, "about: expected an object"),
        ({"part": {"count": 1}, "about": nested(10_000)}, "expected numbers of a usable size"),
    ],
)  # fmt: skip
def test_wrong_content_is_a_sentence_that_names_the_field(content, sentence):
    pattern = sentence.replace("[", r"\[").replace("^", r"\^")
    with pytest.raises(ConfigError, match=f"^{pattern}") as error:
        fitting(Whole, content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_foreign_content_may_have_more_fields_but_not_wrong_ones():
    assert fitting(Foreign, {"count": 1, "more": [math.nan, 10**30]}, foreign=True) == Foreign(1)
    for wrong in ({"count": "x"}, {"count": 1, "layers": 5}, {"count": 10**30}, 5, None):
        with pytest.raises(ConfigError, match="expected"):
            fitting(Foreign, wrong, foreign=True)


def test_a_wrong_value_is_shown_on_one_short_line():
    assert shown("a\n\x1b]0;x\x07") == r"'a\n\x1b]0;x\x07'"
    assert len(shown("é" * 5000)) < 100
    assert shown(10**5000) == "one of about 5001 digits"
    assert named(int | None) == "a whole number or None"
