"""How loss weights are written and read, and the registry of the named ones."""

import pytest

from offramp.errors import ConfigError
from offramp.exits.objective import ObjectiveConfig
from offramp.exits.weightings import (
    FORMS,
    HELP,
    WEIGHTINGS,
    parse_loss_weights,
    read_loss_weights,
)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("standard", {4: 1.0}),
        ("asymmetric:0.3", {2: 0.3, 4: 0.7}),
        ("asymmetric:1", {2: 1.0}),
        ("deep_supervision", {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}),
        ("asymmetric_exits:0.6", {2: 0.3, 3: 0.3, 4: 0.4}),
        ("asymmetric_deep_supervision:0.7", {2: 0.7, 3: 1.0, 4: 0.3}),
        ("recommended", {1: 0.7, 4: 0.3}),
        ("1=0.7,4=0.3", {1: 0.7, 4: 0.3}),
        ("4=1e-1, 2 = 2", {2: 2.0, 4: 0.1}),
        ("3=1,4=0", {3: 1.0}),
        ("free", {2: 1 / 3, 4: 2 / 3}),
        ("ee_llm:0.25:0.5", {2: 0.25, 3: 0.5, 4: 1.0}),
        ("linear", {2: 2 / 9, 3: 3 / 9, 4: 4 / 9}),
        ("layerskip:0.1", {2: 0.1, 3: 0.3, 4: 3.3}),
    ],
)
def test_every_written_form_is_read(spec, expected):
    read = parse_loss_weights(spec, num_layers=4, exit_layers=(2, 3, 4))
    assert read == pytest.approx(expected)
    assert list(read) == sorted(read)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "expected standard"),
        ("junk", "got 'junk'"),
        ("standard:3", "got 'standard:3'"),
        ("recommended:0.5", "got 'recommended:0.5'"),
        ("asymmetric", "expected asymmetric:ALPHA"),
        ("asymmetric:", "expected asymmetric:ALPHA"),
        ("asymmetric:high", "got 'high'"),
        ("asymmetric:1.01", "alpha: expected a number from 0 to 1, got 1.01"),
        ("asymmetric:-0.01", "alpha"),
        ("asymmetric:nan", "alpha"),
        ("asymmetric:inf", "alpha"),
        ("asymmetric_deep_supervision:1.5", "alpha"),
        ("asymmetric_deep_supervision", "expected asymmetric_deep_supervision:ALPHA"),
        ("1=nan", "got nan at layer 1"),
        ("1=inf", "got inf at layer 1"),
        ("1=-0.5,3=1", "got -0.5 at layer 1"),
        ("1=0,2=0", "at least one weight above 0"),
        ("0=1", "layers from 1 to 4, got 0"),
        ("5=1", "layers from 1 to 4, got 5"),
        ("1=0.5,1=0.5", "layer 1 twice"),
        ("1=0.5,01=0.5", "layer 01 twice"),
        ("1=", "got ''"),
        ("=1", "got '=1'"),
        ("1=1,", "got ''"),
        ("1=1,2", "got"),
        ("first=1", "got 'first=1'"),
        ("-1=1", "got '-1=1'"),
        ("²=1", "got '²=1'"),
        ("1=0.7;3=0.3", "got '0.7;3=0.3'"),
        ("free:1", "got 'free:1'"),
        ("linear:4", "got 'linear:4'"),
        ("ee_llm", "expected ee_llm:WEIGHT:WEIGHT:..., a number, got ''"),
        ("ee_llm:0.25:0.5", "expected a weight for each exit layer but the last (1), got 2"),
        ("ee_llm:0.25:", "got ''"),
        ("ee_llm:-0.25", "got -0.25 at layer 1"),
        ("ee_llm:nan", "got nan at layer 1"),
        ("layerskip", "expected layerskip:E_SCALE, a number, got ''"),
        ("layerskip:big", "got 'big'"),
        ("layerskip:-1", "expected E_SCALE of at least 0, got -1.0"),
        ("layerskip:nan", "expected E_SCALE of at least 0, got nan"),
        ("layerskip:inf", "expected E_SCALE of at least 0, got inf"),
    ],
)
def test_a_wrong_written_form_is_a_config_error(spec, message):
    with pytest.raises(ConfigError) as caught:
        parse_loss_weights(spec, num_layers=4, exit_layers=(1, 4))
    assert message in str(caught.value)


EXAMPLES = {
    "": "",
    "ALPHA": ":0.7",
    "E_SCALE": ":0.1",
    "WEIGHT:WEIGHT:...": ":0.25:0.5",
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_entry_of_the_registry_can_be_written(name):
    weighting = WEIGHTINGS[name]
    written = name + EXAMPLES[weighting.argument]
    parsed = read_loss_weights(written)
    assert parsed.weighting is weighting
    assert parsed.weights(num_layers=4, exit_layers=(1, 3, 4))
    assert weighting.source
    assert f"{weighting.written} ({weighting.formula})" in HELP
    assert weighting.written in FORMS
    beyond = {1, 2, 3, 4} == set(parsed.weights(num_layers=4, exit_layers=(2, 3, 4)))
    assert beyond <= weighting.over_all_layers


def test_the_error_for_an_unknown_name_lists_every_form():
    with pytest.raises(ConfigError) as caught:
        read_loss_weights("junk")
    assert str(caught.value) == f"loss weights: expected {FORMS}; got 'junk'"


def test_the_objective_refuses_by_the_registry():
    for name, weighting in WEIGHTINGS.items():
        written = name + EXAMPLES[weighting.argument]
        for fields, allowed in (
            ({"curriculum": "gradual"}, weighting.over_all_layers),
            ({"alpha_end": 0.1, "alpha_schedule": "linear"}, weighting.takes_alpha),
        ):
            if allowed:
                ObjectiveConfig(loss_weights=written, **fields)
                continue
            with pytest.raises(ConfigError) as caught:
                ObjectiveConfig(loss_weights=written, **fields)
            if name != "standard":
                assert "asymmetric_deep_supervision" in str(caught.value)
