"""The objective as a value: what it refuses, and the learning rates of layers."""

import pytest

from offramp.errors import ConfigError
from offramp.exits.objective import NEED_EARLY_EXITS, ObjectiveConfig, is_set, layer_lr_factors

LEGAL = {
    "alpha_end": {"alpha_end": 0.3, "alpha_schedule": "linear"},
    "weight_warmup": {"weight_warmup": "linear", "weight_warmup_steps": 10},
    "curriculum": {"curriculum": "gradual"},
    "gradient_equilibrium": {"gradient_equilibrium": True},
    "detach_exits": {"detach_exits": True},
    "distill": {"distill": 0.5},
    "backbone_steps": {"backbone_steps": 5},
}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alpha_end": 1.5, "alpha_schedule": "linear"}, ("alpha_end", "0 to 1", "1.5")),
        ({"alpha_end": float("nan"), "alpha_schedule": "linear"}, ("alpha_end", "nan")),
        ({"weight_warmup_steps": -1}, ("weight_warmup_steps", "at least 0", "-1")),
        ({"backbone_steps": -1}, ("backbone_steps", "at least 0", "-1")),
        ({"distill": -0.5}, ("distill", "at least 0", "-0.5")),
        ({"distill": float("inf")}, ("distill", "inf")),
        ({"distill": 1.0, "distill_temperature": 0.0}, ("distill_temperature", "above 0")),
        ({"layer_dropout": 1.0}, ("layer_dropout", "less than 1", "1.0")),
        ({"layer_dropout": -0.1}, ("layer_dropout", "-0.1")),
        ({"layer_dropout": float("nan")}, ("layer_dropout", "nan")),
        ({"curriculum": "rotational"}, ("curriculum", "rotational:R", "'rotational'")),
        ({"curriculum": "rotational:0"}, ("curriculum", "at least 1")),
        ({"curriculum": "rotational:1.5"}, ("curriculum", "whole R")),
        ({"curriculum": "gradual:3"}, ("curriculum", "'gradual:3'")),
        ({"layer_lr": "decay:"}, ("layer_lr", "decay:F")),
        ({"layer_lr": "decay:0"}, ("layer_lr", "above 0", "'decay:0'")),
        ({"layer_lr": "decay:nan"}, ("layer_lr", "'decay:nan'")),
        ({"layer_lr": "0.5"}, ("layer_lr", "LAYER=FACTOR", "'0.5'")),
        ({"layer_lr": "1=0.5,1=0.4"}, ("layer_lr", "layer 1 twice")),
        ({"layer_lr": "1=-1"}, ("layer_lr", "-1.0 at layer 1")),
        ({"layer_lr": "1=fast"}, ("layer_lr", "LAYER=FACTOR", "'fast'")),
        # contradictions name both fields
        ({"alpha_end": 0.3}, ("alpha_end", "alpha_schedule")),
        ({"alpha_schedule": "linear"}, ("alpha_end", "alpha_schedule")),
        ({"alpha_steps": (3,)}, ("alpha_steps", "alpha_schedule 'constant'", "got 3")),
        (
            {"alpha_end": 0.3, "alpha_schedule": "cosine", "alpha_steps": (3, 6)},
            ("alpha_steps", "alpha_schedule 'cosine'", "got 3,6"),
        ),
        ({"alpha_end": 0.3, "alpha_schedule": "step"}, ("alpha_steps", "alpha_schedule 'step'")),
        (
            {"alpha_end": 0.3, "alpha_schedule": "step", "alpha_steps": (6, 3)},
            ("alpha_steps", "ascending", "6,3"),
        ),
        (
            {"alpha_end": 0.3, "alpha_schedule": "step", "alpha_steps": (0,)},
            ("alpha_steps", "from 1"),
        ),
        (
            {"loss_weights": "free", **LEGAL["alpha_end"]},
            ("alpha_end", "loss_weights 'free'"),
        ),
        (
            {"loss_weights": "recommended", **LEGAL["alpha_end"]},
            ("alpha_end", "loss_weights 'recommended'"),
        ),
        ({"weight_warmup": "linear"}, ("weight_warmup", "weight_warmup_steps")),
        ({"weight_warmup_steps": 3}, ("weight_warmup", "weight_warmup_steps")),
        ({"layer_dropout_schedule": "exponential"}, ("layer_dropout_schedule", "layer_dropout")),
        ({"distill_temperature": 2.0}, ("distill_temperature", "expected distill above 0")),
        ({"detach_exits": True, "gradient_equilibrium": True}, ("detach_exits", "gradient_eq")),
        ({"curriculum": "gradual"}, ("curriculum", "loss_weights 'asymmetric:0.7'")),
        (
            {"curriculum": "gradual", "loss_weights": "ee_llm:0.5"},
            ("curriculum", "loss_weights 'ee_llm:0.5'"),
        ),
        (
            {"curriculum": "gradual", "loss_weights": "1=0.2,2=0.8"},
            ("curriculum", "loss_weights '1=0.2,2=0.8'"),
        ),
    ],
)
def test_what_makes_no_sense_is_a_config_error(fields, words):
    with pytest.raises(ConfigError) as caught:
        ObjectiveConfig(**fields)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alpha_schedule", "constant, linear, cosine or step"),
        ("weight_warmup", "none, linear or cosine"),
        ("layer_dropout_schedule", "constant or exponential"),
    ],
)
def test_a_word_that_is_no_choice_is_a_config_error(name, expected):
    config = ObjectiveConfig()
    object.__setattr__(config, name, "junk")  # the tests' type check would stop the constructor
    with pytest.raises(ConfigError) as caught:
        config.__post_init__()
    assert str(caught.value) == f"{name}: expected {expected}, got 'junk'"


@pytest.mark.parametrize("name", NEED_EARLY_EXITS)
def test_what_needs_early_exits_is_refused_with_the_standard_loss(name):
    with pytest.raises(ConfigError, match=f"{name}: .*loss_weights 'standard'"):
        ObjectiveConfig(loss_weights="standard", **LEGAL[name])


@pytest.mark.parametrize("name", NEED_EARLY_EXITS)
def test_the_same_fields_go_with_early_exits(name):
    weights = "deep_supervision" if name == "curriculum" else "asymmetric:0.7"
    config = ObjectiveConfig(loss_weights=weights, **LEGAL[name])
    assert is_set(config, name)
    assert not is_set(ObjectiveConfig(), name)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}),
        ("decay:0.5", {0: 0.125, 1: 0.25, 2: 0.5, 3: 1.0}),
        ("decay:1", {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}),
        ("0=0,2=0.25", {0: 0.0, 1: 1.0, 2: 0.25, 3: 1.0}),
        ("3=2", {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0}),
    ],
)
def test_learning_rate_factors_equal_the_table(written, expected):
    assert layer_lr_factors(ObjectiveConfig(layer_lr=written), 3) == pytest.approx(expected)


def test_ulmfits_rates_fall_by_2_6_a_layer():
    factors = layer_lr_factors(ObjectiveConfig(layer_lr=f"decay:{1 / 2.6!r}"), 4)
    for layer in range(1, 5):
        assert factors[layer] / factors[layer - 1] == pytest.approx(2.6)


def test_a_learning_rate_for_a_layer_that_does_not_exist():
    with pytest.raises(ConfigError, match="layer_lr: expected layers from 0 to 3, got 4"):
        layer_lr_factors(ObjectiveConfig(layer_lr="4=0.5"), 3)
