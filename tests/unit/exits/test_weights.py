"""Loss weights against tables worked out by hand."""

import pickle
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import ConfigError
from offramp.exits.weights import (
    RECOMMENDED,
    LossWeights,
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


def test_weights_are_a_read_only_mapping():
    weights = asymmetric(0.25, num_layers=3)
    assert weights == {1: 0.25, 3: 0.75} == weights
    assert weights != {1: 0.25}
    assert weights.get(2, 0.0) == 0
    assert repr(weights) == "LossWeights({1: 0.25, 3: 0.75})"
    with pytest.raises(TypeError):
        weights[1] = 1.0
    with pytest.raises(FrozenInstanceError):
        weights.pairs = ()
    assert LossWeights.of(weights) == pickle.loads(pickle.dumps(weights)) == weights


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
