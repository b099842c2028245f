"""Keyword arguments become a config, and wrong ones a sentence."""

from dataclasses import dataclass
from typing import Literal

import pytest

from offramp.errors import ConfigError
from offramp.options import config_of


@dataclass(frozen=True, kw_only=True)
class Options:
    steps: int = 1
    rate: float = 0.5
    layers: tuple[int, ...] | None = None
    kind: Literal["pre", "post"] = "pre"
    quiet: bool = False
    name: str = ""


def test_values_of_the_right_types_are_kept():
    options = config_of(Options, {"steps": 3, "layers": [1, 2], "kind": "post", "quiet": True})
    assert options == Options(steps=3, layers=(1, 2), kind="post", quiet=True)


def test_a_whole_number_for_a_number_becomes_a_float():
    rate = config_of(Options, {"rate": 2}).rate
    assert rate == 2.0
    assert isinstance(rate, float)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", "x", "a whole number, got 'x'"),
        ("steps", 1.5, "a whole number"),
        ("steps", True, "a whole number"),
        ("steps", None, "a whole number"),
        ("rate", "0.5", "a number"),
        ("rate", 10**400, "a number below"),
        ("layers", 3, "whole numbers or None"),
        ("layers", ["a"], "a whole number, got 'a'"),
        ("layers", [[1]], "a whole number"),
        ("kind", "best", "'pre' or 'post'"),
        ("kind", ["pre"], "'pre' or 'post'"),
        ("kind", {}, "'pre' or 'post'"),
        ("quiet", 1, "True or False"),
        ("name", 5, "a string"),
    ],
)
def test_a_wrong_value_is_a_sentence(name, value, expected):
    with pytest.raises(ConfigError, match=rf"^{name}(\[0\])?: expected .*{expected}"):
        config_of(Options, {name: value})


@pytest.mark.parametrize(("name", "near"), [("step", "steps"), ("deep", "depth")])
def test_an_unknown_name_gets_the_nearest_as_a_hint(name, near):
    with pytest.raises(ConfigError, match=f"^{name}: expected the name of an option, .*{near}"):
        config_of(Options, {name: 1}, also=("depth",))
