"""Loss weights over a run, against tables worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import ConfigError
from offramp.exits.objective import ObjectiveConfig
from offramp.exits.schedules import loss_schedule

EIGHTH = 0.5 * (1 - math.cos(math.pi / 4))
"""Half a cosine, a quarter of the way: 0.1464..."""


def run(config: ObjectiveConfig, total_steps: int, *, num_layers: int, exit_layers=None):
    """The weights of every step, after the check that a run makes first."""
    shape = {"num_layers": num_layers, "exit_layers": exit_layers or (1, num_layers)}
    schedule = loss_schedule(config, total_steps=total_steps, **shape)
    return [schedule.at(step) for step in range(1, total_steps + 1)]


def test_without_schedules_the_weights_are_as_written():
    for weights in run(ObjectiveConfig(loss_weights="asymmetric:0.7"), 3, num_layers=4):
        assert weights == pytest.approx({1: 0.7, 4: 0.3})


@pytest.mark.parametrize(
    ("schedule", "steps", "alphas"),
    [
        ("linear", (), [0.9, 0.7, 0.5, 0.3, 0.1]),
        ("cosine", (), [0.9, 0.9 - 0.8 * EIGHTH, 0.5, 0.1 + 0.8 * EIGHTH, 0.1]),
        ("linear", (3,), [0.9, 0.5, 0.1, 0.1, 0.1]),
        ("cosine", (3,), [0.9, 0.5, 0.1, 0.1, 0.1]),
        ("linear", (1,), [0.1, 0.1, 0.1, 0.1, 0.1]),
        ("linear", (9,), [0.9, 0.8, 0.7, 0.6, 0.5]),
        ("step", (2,), [0.9, 0.9, 0.1, 0.1, 0.1]),
        ("step", (1, 4), [0.9, 0.5, 0.5, 0.5, 0.1]),
        ("step", (1, 2, 3, 4), [0.9, 0.7, 0.5, 0.3, 0.1]),
    ],
)
def test_alpha_equals_the_table(schedule, steps, alphas):
    fields = {"alpha_end": 0.1, "alpha_schedule": schedule, "alpha_steps": steps}
    plain = run(ObjectiveConfig(loss_weights="asymmetric:0.9", **fields), 5, num_layers=4)
    deep = ObjectiveConfig(loss_weights="asymmetric_deep_supervision:0.9", **fields)
    for weights, middle, alpha in zip(plain, run(deep, 5, num_layers=4), alphas, strict=True):
        assert weights == pytest.approx({1: alpha, 4: 1 - alpha})
        assert middle == pytest.approx({1: alpha, 2: 1.0, 3: 1.0, 4: 1 - alpha})


def test_alpha_reaches_both_ends_exactly_and_zero_weights_are_left_out():
    config = ObjectiveConfig(loss_weights="asymmetric:0", alpha_end=1.0, alpha_schedule="linear")
    weights = run(config, 3, num_layers=4, exit_layers=(2, 4))
    assert weights == [{4: 1.0}, {2: 0.5, 4: 0.5}, {2: 1.0}]
    shape = {"num_layers": 4, "exit_layers": (2, 4)}
    assert loss_schedule(config, total_steps=3, **shape).layers == (2, 4)


@pytest.mark.parametrize(
    ("shape", "grown"),
    [
        ("linear", [0, 0.25, 0.5, 0.75, 1, 1]),
        ("cosine", [0, EIGHTH, 0.5, 1 - EIGHTH, 1, 1]),
    ],
)
def test_early_exits_grow_from_0_and_the_last_layer_stays(shape, grown):
    config = ObjectiveConfig(
        loss_weights="ee_llm:0.25:0.5", weight_warmup=shape, weight_warmup_steps=4
    )
    weights = run(config, 6, num_layers=8, exit_layers=(2, 4, 8))
    assert weights[0] == {8: 1.0}
    for step, share in zip(weights[1:], grown[1:], strict=True):
        assert step == pytest.approx({2: 0.25 * share, 4: 0.5 * share, 8: 1.0})


def test_the_rotational_curriculum_equals_the_table():
    config = ObjectiveConfig(loss_weights="deep_supervision", curriculum="rotational:3")
    third, half = 1 / 3, 1 / 2
    cycle = [
        {1: third, 4: third, 6: third},
        {2: third, 5: third, 6: third},
        {3: half, 6: half},
    ]
    for weights, expected in zip(run(config, 6, num_layers=6), cycle * 2, strict=True):
        assert weights == pytest.approx(expected)


def test_layerskips_scale_is_masked_and_then_normalised():
    """L = 4, e_scale 1: e = 0, 1, 3, 6. Layers 1 and 3, then 2; the last always."""
    rotational = ObjectiveConfig(loss_weights="layerskip:1", curriculum="rotational:2")
    table = [{3: 3 / 9, 4: 6 / 9}, {2: 1 / 7, 4: 6 / 7}]
    for weights, expected in zip(run(rotational, 4, num_layers=4), table * 2, strict=True):
        assert weights == pytest.approx(expected)
    for weights in run(ObjectiveConfig(loss_weights="layerskip:1"), 2, num_layers=4):
        assert weights == pytest.approx({2: 0.1, 3: 0.3, 4: 0.6})


def test_the_gradual_curriculum_equals_the_table():
    """L = 4, T = 16: a layer more every 2 steps; the last layer's turn is used up by itself."""
    config = ObjectiveConfig(loss_weights="deep_supervision", curriculum="gradual")
    table = [(4,)] * 4 + [(3, 4)] * 2 + [(2, 3, 4)] * 2 + [(1, 2, 3, 4)] * 8
    for weights, layers in zip(run(config, 16, num_layers=4), table, strict=True):
        assert weights == pytest.approx(dict.fromkeys(layers, 1 / len(layers)))


@given(num_layers=st.integers(2, 24), period=st.integers(1, 30), first=st.integers(1, 100))
def test_every_layer_has_its_turn_once_a_cycle(num_layers, period, first):
    config = ObjectiveConfig(loss_weights="deep_supervision", curriculum=f"rotational:{period}")
    shape = {"num_layers": num_layers, "exit_layers": (1, num_layers)}
    turns = dict.fromkeys(range(1, num_layers + 1), 0)
    schedule = loss_schedule(config, total_steps=200, **shape)
    for step in range(first, first + period):
        weights = schedule.at(step)
        early = [layer for layer in weights if layer < num_layers]
        assert len(early) <= math.ceil(num_layers / period)
        for layer in weights:
            turns[layer] += 1
    assert turns == {**dict.fromkeys(range(1, num_layers), 1), num_layers: period}


def test_a_backbone_stage_comes_first_and_schedules_count_from_its_end():
    joint = {
        "loss_weights": "asymmetric:0.9",
        "alpha_end": 0.1,
        "alpha_schedule": "linear",
        "weight_warmup": "cosine",
        "weight_warmup_steps": 2,
    }
    two_stages = run(ObjectiveConfig(**joint, backbone_steps=3), 8, num_layers=4)
    assert two_stages[:3] == [{4: 1.0}] * 3
    assert two_stages[3:] == run(ObjectiveConfig(**joint), 5, num_layers=4)
    gradual = {"loss_weights": "layerskip:0.5", "curriculum": "gradual"}
    late = run(ObjectiveConfig(**gradual, backbone_steps=5), 21, num_layers=4)
    assert late[5:] == run(ObjectiveConfig(**gradual), 16, num_layers=4)


def test_target_weights_are_where_the_schedules_lead():
    def target(**fields):
        shape = {"total_steps": 10, "num_layers": 4, "exit_layers": (1, 4)}
        return loss_schedule(ObjectiveConfig(**fields), **shape).target

    alpha = {"loss_weights": "asymmetric:0.9", "alpha_end": 0.2, "alpha_schedule": "cosine"}
    assert target(**alpha, backbone_steps=9) == pytest.approx({1: 0.2, 4: 0.8})
    warm = {"weight_warmup": "linear", "weight_warmup_steps": 10**6}
    assert target(loss_weights="ee_llm:0.5", **warm) == {1: 0.5, 4: 1.0}
    skip = target(loss_weights="layerskip:1", curriculum="rotational:2")
    assert skip == pytest.approx({2: 0.1, 3: 0.3, 4: 0.6})


ALPHA = st.sampled_from(["0", "0.3", "1"])
WEIGHTINGS = st.one_of(
    st.sampled_from(["free", "linear", "deep_supervision", "layerskip:0.1", "recommended"]),
    st.sampled_from(["standard", "2=0.5,4=0.5", "1=1", "ee_llm:0.25:0"]),
    ALPHA.map("asymmetric:{}".format),
    ALPHA.map("asymmetric_deep_supervision:{}".format),
)
FIELDS = st.fixed_dictionaries(
    {"loss_weights": WEIGHTINGS, "backbone_steps": st.sampled_from([0, 3])},
    optional={
        "curriculum": st.sampled_from(["gradual", "rotational:2", "rotational:3"]),
        "distill": st.just(0.5),
        "detach_exits": st.just(True),
    },
)
TO_ALPHA = st.fixed_dictionaries(
    {"alpha_end": st.sampled_from([0.0, 0.5, 1.0])},
    optional={"alpha_steps": st.just((7,))},
)
WARMUP = st.just({"weight_warmup": "linear", "weight_warmup_steps": 5})


@given(
    fields=FIELDS,
    to_alpha=st.one_of(st.just({}), TO_ALPHA),
    schedule=st.sampled_from(["linear", "cosine", "step"]),
    warmup=st.one_of(st.just({}), WARMUP),
    exit_layers=st.sampled_from([(1, 2, 4), (2, 3, 4), (1, 2, 3, 4)]),
)
def test_what_passes_the_check_has_weights_at_every_step(
    fields, to_alpha, schedule, warmup, exit_layers
):
    """And the schedule's layers are those that appear in a run that is long enough."""
    if to_alpha:
        to_alpha = {**to_alpha, "alpha_schedule": schedule}
        if schedule == "step":
            to_alpha["alpha_steps"] = (4, 8)
    try:
        config = ObjectiveConfig(**fields, **to_alpha, **warmup)
        every_step = run(config, 40, num_layers=4, exit_layers=exit_layers)
    except ConfigError:
        return
    shape = {"num_layers": 4, "exit_layers": exit_layers}
    for weights in every_step:
        assert all(weight > 0 for weight in weights.values())
        assert list(weights) == sorted(weights)
        if config.curriculum != "none":
            assert sum(weights.values()) == pytest.approx(1)
    seen = {layer for weights in every_step for layer in weights}
    assert tuple(sorted(seen)) == loss_schedule(config, total_steps=40, **shape).layers


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss_weights": "5=1"}, ("layers from 1 to 4, got 5",)),
        ({"loss_weights": "asymmetric:2"}, ("alpha", "got 2.0")),
        ({"loss_weights": "4=1", "distill": 0.5}, ("distill", "loss_weights '4=1'")),
        ({"loss_weights": "asymmetric:0", "detach_exits": True}, ("detach_exits", "early exit")),
        (
            {"loss_weights": "layerskip:0", "curriculum": "gradual"},
            ("curriculum", "early exit", "loss_weights 'layerskip:0'"),
        ),
        (
            {"loss_weights": "4=1", "gradient_equilibrium": True},
            ("gradient_equilibrium", "loss_weights '4=1'"),
        ),
        ({"loss_weights": "4=1", "backbone_steps": 2}, ("backbone_steps", "loss_weights '4=1'")),
        (
            {"loss_weights": "asymmetric:1", "distill": 0.5},
            ("distill", "teacher", "loss_weights 'asymmetric:1'"),
        ),
        (
            {
                "loss_weights": "asymmetric:0.5",
                "alpha_end": 1.0,
                "alpha_schedule": "linear",
                "distill": 0.5,
            },
            ("distill", "alpha_end"),
        ),
        (
            {"loss_weights": "1=1", "weight_warmup": "linear", "weight_warmup_steps": 3},
            ("weight_warmup", "last layer", "loss_weights '1=1'"),
        ),
        (
            {"loss_weights": "asymmetric_deep_supervision:1", "curriculum": "gradual"},
            ("curriculum", "last layer"),
        ),
        (
            {"loss_weights": "linear", "curriculum": "rotational:2"},
            ("curriculum", "each of the 4 layers", "loss_weights 'linear'", "got exit layers 2,4"),
        ),
        ({"backbone_steps": 10}, ("backbone_steps", "the 10 steps", "got 10")),
        ({"layer_lr": "5=1"}, ("layer_lr", "from 0 to 4, got 5")),
    ],
)
def test_what_does_not_fit_the_model_or_the_run_is_a_config_error(fields, words):
    config = ObjectiveConfig(**fields)
    with pytest.raises(ConfigError) as caught:
        loss_schedule(config, total_steps=10, num_layers=4, exit_layers=(2, 4))
    for word in words:
        assert word in str(caught.value)


def test_a_model_that_exits_only_at_the_end_has_no_early_exits():
    config = ObjectiveConfig(loss_weights="asymmetric:0.7", distill=0.5)
    with pytest.raises(ConfigError, match="distill: expected loss_weights with an early exit"):
        loss_schedule(config, total_steps=10, num_layers=4, exit_layers=(4,))


def test_exits_may_train_on_a_trunk_that_nothing_trains():
    """Detached exits and no weight on the last layer: only the heads learn."""
    config = ObjectiveConfig(loss_weights="2=1", detach_exits=True)
    assert run(config, 2, num_layers=4) == [{2: 1.0}] * 2
