"""Loss weights against tables worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import ConfigError
from offramp.exits.weights import (
    RECOMMENDED,
    asymmetric,
    asymmetric_deep_supervision,
    asymmetric_exits,
    check_loss_weights,
    deep_supervision,
    ee_llm,
    free,
    layerskip,
    linear,
    normalized,
    parse_loss_weights,
    standard,
)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: standard(3), {3: 1.0}),
        (lambda: standard(1), {1: 1.0}),
        (lambda: asymmetric(0.3, num_layers=3), {1: 0.3, 3: 0.7}),
        (lambda: asymmetric(0.7, num_layers=3), {1: 0.7, 3: 0.3}),
        (lambda: asymmetric(0.5, num_layers=6, exit_layer=2), {2: 0.5, 6: 0.5}),
        (lambda: asymmetric(1.0, num_layers=3), {1: 1.0}),
        (lambda: asymmetric(0.0, num_layers=3), {3: 1.0}),
        (lambda: asymmetric(0.7, num_layers=3, exit_layer=3), {3: 1.0}),
        (lambda: asymmetric(1.0, num_layers=1), {1: 1.0}),
        (lambda: deep_supervision(4), {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}),
        (
            lambda: asymmetric_exits(0.6, exit_layers=(1, 3, 4), num_layers=4),
            {1: 0.3, 3: 0.3, 4: 0.4},
        ),
        (lambda: asymmetric_exits(0.6, exit_layers=(2, 3), num_layers=3), {2: 0.6, 3: 0.4}),
        (lambda: asymmetric_deep_supervision(0.7, num_layers=3), {1: 0.7, 2: 1.0, 3: 0.3}),
        (
            lambda: asymmetric_deep_supervision(0.2, num_layers=5, exit_layer=2),
            {2: 0.2, 3: 1.0, 4: 1.0, 5: 0.8},
        ),
        (
            lambda: asymmetric_deep_supervision(0.7, num_layers=4, middle=0.1),
            {1: 0.7, 2: 0.1, 3: 0.1, 4: 0.3},
        ),
        (lambda: asymmetric_deep_supervision(0.7, num_layers=3, middle=0.0), {1: 0.7, 3: 0.3}),
        (lambda: asymmetric_deep_supervision(0.7, num_layers=3, exit_layer=3), {3: 1.0}),
        (lambda: free(1, 3), {1: 1 / 4, 3: 3 / 4}),
        (lambda: free(6, 24), {6: 0.2, 24: 0.8}),
        (lambda: free(3, 3), {3: 1.0}),
        (
            lambda: ee_llm((0.25, 0.5), exit_layers=(6, 12, 24), num_layers=24),
            {6: 0.25, 12: 0.5, 24: 1.0},
        ),
        (
            lambda: ee_llm((0.1, 0.2), exit_layers=(8, 16), num_layers=32),
            {8: 0.1, 16: 0.2, 32: 1.0},
        ),
        (lambda: ee_llm((0.0, 0.5), exit_layers=(1, 2, 3), num_layers=3), {2: 0.5, 3: 1.0}),
        (lambda: ee_llm((), exit_layers=(3,), num_layers=3), {3: 1.0}),
        (lambda: linear((1, 2, 3, 4)), {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}),
        (lambda: linear((2, 3, 5)), {2: 0.2, 3: 0.3, 5: 0.5}),
        (lambda: linear((4,)), {4: 1.0}),
        # e(l), l from 0: 0, s, s (1 + 2), ..., and 3 + s (1 + 2) or 5 + s (1 + 2 + 3 + 4)
        (lambda: layerskip(4, 1.0), {2: 1.0, 3: 3.0, 4: 6.0}),
        (lambda: layerskip(4, 0.1), {2: 0.1, 3: 0.3, 4: 3.3}),
        (lambda: layerskip(6, 0.2), {2: 0.2, 3: 0.6, 4: 1.2, 5: 2.0, 6: 7.0}),
        (lambda: layerskip(2, 1.0), {2: 1.0}),
        (lambda: layerskip(4, 0.0), {4: 3.0}),
        (lambda: layerskip(1, 1.0), {1: 1.0}),
    ],
)
def test_presets_equal_the_table(make, expected):
    weights = make()
    assert weights == pytest.approx(expected)
    assert list(weights) == sorted(weights)


def test_the_recommendation_is_the_seed_documents():
    assert (RECOMMENDED.alpha, RECOMMENDED.exit_layer, RECOMMENDED.threshold) == (0.7, 1, 0.95)


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


@pytest.mark.parametrize("make", [asymmetric, asymmetric_deep_supervision])
@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_stays_between_0_and_1(make, alpha):
    with pytest.raises(ConfigError, match="alpha"):
        make(alpha, num_layers=3)


@pytest.mark.parametrize("make", [asymmetric, asymmetric_deep_supervision])
@pytest.mark.parametrize("exit_layer", [0, 4])
def test_the_exit_is_a_layer_of_the_model(make, exit_layer):
    with pytest.raises(ConfigError, match="layers from 1 to 3"):
        make(0.5, num_layers=3, exit_layer=exit_layer)


def test_zero_weights_are_left_out_and_the_input_is_not_changed():
    given = {3: 1.0, 1: 0.0, 2: 0.5}
    assert check_loss_weights(given, 3) == {2: 0.5, 3: 1.0}
    assert given == {3: 1.0, 1: 0.0, 2: 0.5}


@given(num_layers=st.integers(2, 40), e_scale=st.floats(0, 10))
def test_layerskip_is_the_papers_sum(num_layers, e_scale):
    """Summed term by term, l from 0, as the paper writes it."""

    def e(below: int) -> float:
        if below < num_layers - 1:
            return e_scale * sum(i for i in range(below + 1))
        return num_layers - 1 + e_scale * sum(i for i in range(num_layers - 1))

    weights = layerskip(num_layers, e_scale)
    for below in range(num_layers):
        assert weights.get(below + 1, 0.0) == pytest.approx(e(below))
    assert 1 not in weights  # e(0) = 0: a first-layer exit is never trained


@given(exit_layer=st.integers(1, 20), deeper=st.integers(1, 20))
def test_free_is_asymmetric_with_alpha_s_over_s_plus_l(exit_layer, deeper):
    num_layers = exit_layer + deeper
    alpha = exit_layer / (exit_layer + num_layers)
    assert free(exit_layer, num_layers) == pytest.approx(
        asymmetric(alpha, num_layers=num_layers, exit_layer=exit_layer)
    )


@pytest.mark.parametrize("exit_layer", [0, 4])
def test_frees_exit_is_a_layer_of_the_model(exit_layer):
    with pytest.raises(ConfigError, match="layers from 1 to 3"):
        free(exit_layer, 3)


def test_normalized_weights_sum_to_1():
    assert normalized({1: 1.0, 4: 3.0}) == {1: 0.25, 4: 0.75}
