import math

import pytest
import torch

from offramp.errors import ConfigError
from offramp.exits.confidence import CONFIDENCE, Agreement, ExitView, confidence_named
from offramp.exits.confidence_names import CONFIDENCE_NAMES, check_confidence
from offramp.exits.gate import FittedExits, Gate

OF_LOGITS = ["max_prob", "margin", "entropy", "patience"]
PROBABILITIES = ["max_prob", "margin", "entropy"]


def view_of(logits, **known):
    return ExitView(exit_layer=2, logits=logits, **known)


def score(name, logits=None, **known):
    return CONFIDENCE[name].score(view_of(logits, **known))


def random_gates(size, *, outputs=1):
    torch.manual_seed(0)
    gates = {"gate": {2: Gate(size)}, "gain": {2: Gate(size, outputs=outputs)}}
    return FittedExits(gates=gates)


def a_view(rows, *, dtype=torch.float32, size=16, vocab_size=101, scale=5.0):
    """Everything that any measure reads, of ``rows`` tokens."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype) * scale

    logits = draw(rows, vocab_size)
    same = torch.arange(rows) % 2 == 0
    earlier = Agreement(torch.where(same, logits.argmax(-1), -1), torch.arange(rows) + 1)
    return {
        "logits": logits,
        "state": draw(rows, size),
        "previous_state": draw(rows, size),
        "earlier": earlier,
        "fitted": random_gates(size),
    }


HAND = torch.tensor([math.log(6.0), math.log(3.0), 0.0], dtype=torch.float64)  # p = .6, .3, .1
HAND_ENTROPY = -(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("max_prob", [0.6, 1 / 3]),
        ("margin", [0.6 - 0.3, 0.0]),
        ("entropy", [1 - HAND_ENTROPY / math.log(3), 0.0]),
        ("patience", [1.0, 1.0]),
    ],
)
def test_hand_values_in_float64(name, expected):
    logits = torch.stack([HAND, torch.full_like(HAND, 7.0)])
    found = score(name, logits)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-14, abs=1e-14)


def test_saturation_is_the_cosine_of_each_token_with_the_state_before():
    state = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
    before = torch.tensor([[4.0, 3.0], [0.0, 5.0], [-1.0, -1.0]], dtype=torch.float64)
    found = score("saturation", state=state, previous_state=before)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([24 / 25, 0.0, -1.0])


def test_saturation_of_a_zero_state_is_finite():
    zero = torch.zeros(1, 4)
    assert score("saturation", state=zero, previous_state=zero).tolist() == [0.0]


def test_patience_counts_the_exits_in_a_row_with_one_first_choice():
    """Over four exits the first choices are a a b b for one token, a b b b for the other."""
    earlier, counts = None, []
    for choices in [(0, 0), (0, 1), (1, 1), (1, 1)]:
        logits = torch.nn.functional.one_hot(torch.tensor(choices), 3).double()
        view = view_of(logits, earlier=earlier)
        counts.append(CONFIDENCE["patience"].score(view).tolist())
        earlier = view.agreement
    assert counts == [[1, 1], [2, 1], [1, 2], [2, 3]]
    assert earlier is not None
    assert earlier.argmax.tolist() == [1, 1]


def test_patience_goes_on_with_the_tokens_that_stay():
    first = view_of(torch.eye(3)).agreement
    rows = torch.tensor([2, 0])
    second = view_of(torch.eye(3)[rows], earlier=Agreement(first.argmax[rows], first.exits[rows]))
    assert CONFIDENCE["patience"].score(second).tolist() == [2, 2]


def set_gate(gate, bias):
    """A gate that says the sum of a normalised state of two numbers, and the biases."""
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        gate.norm.weight.fill_(1.0)
        gate.up_proj.weight.copy_(torch.eye(2))
        gate.out_proj.weight.fill_(1.0)
        gate.out_proj.bias.copy_(torch.tensor(bias))
    return gate


def silu(x):
    return x / (1 + math.exp(-x))


def test_a_gate_by_hand():
    """State (3, 1): its RMS is sqrt 5."""
    x = silu(3 / math.sqrt(5)) + silu(1 / math.sqrt(5))
    gates = {
        "gate": {2: set_gate(Gate(2), [0.5])},
        "gain": {2: set_gate(Gate(2, outputs=2), [-1.0, 2.0])},
    }
    known = {"state": torch.tensor([[3.0, 1.0]]), "fitted": FittedExits(gates=gates)}
    assert score("gate", **known).tolist() == pytest.approx([1 / (1 + math.exp(-x - 0.5))])
    kl = [math.log1p(math.exp(x - 1.0)), math.log1p(math.exp(x + 2.0))]
    assert view_of(None, **known).expected_kl.tolist() == [pytest.approx(kl)]
    assert score("gain", **known).tolist() == pytest.approx([-kl[0]])


@pytest.mark.parametrize("name", ["gate", "gain", "saturation"])
def test_a_measure_of_states_never_computes_logits(name):
    def refuse():
        raise AssertionError("the head ran")

    known = a_view(3)
    known["logits"] = refuse
    assert not CONFIDENCE[name].needs_head
    assert score(name, **known).shape == (3,)


@pytest.mark.parametrize("name", OF_LOGITS)
def test_logits_are_computed_once_and_only_when_asked_for(name):
    calls = []

    def compute():
        calls.append(1)
        return torch.eye(3)

    view = view_of(compute)
    assert calls == []
    CONFIDENCE[name].score(view)
    assert view.argmax.tolist() == [0, 1, 2]
    assert len(calls) == 1
    assert CONFIDENCE[name].needs_head


def test_a_gate_that_nobody_fitted_is_a_config_error():
    with pytest.raises(ConfigError, match="a fitted gain at exit layer 2, found none"):
        score("gain", state=torch.zeros(1, 4))


def test_an_unknown_measure_is_a_config_error():
    with pytest.raises(ConfigError, match="one of max_prob, margin"):
        confidence_named("top1")


@pytest.mark.parametrize("name", PROBABILITIES)
def test_the_temperature_of_the_exit_divides_its_logits(name):
    logits = torch.tensor([[2.0, 1.0, 0.0, -3.0]], dtype=torch.float64)
    fitted = FittedExits(temperatures={2: 2.5, 3: 0.1})
    hot = score(name, logits, fitted=fitted)
    assert hot.tolist() == pytest.approx(score(name, logits / 2.5).tolist())
    assert hot < score(name, logits)


EXTREME = [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [1e4, 1e4, -1e4]]


@pytest.mark.parametrize("name", PROBABILITIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_give_the_right_scores(name, dtype):
    expected = {
        "max_prob": [1, 1 / 3, 1 / 3, 1 / 2],
        "margin": [1, 0, 0, 0],
        "entropy": [1, 0, 0, 1 - math.log(2) / math.log(3)],
    }
    scores = score(name, torch.tensor(EXTREME, dtype=dtype))
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert scores.tolist() == pytest.approx(expected[name], abs=1e-6)
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("name", PROBABILITIES)
def test_tokens_that_a_model_masks_out_leave_the_scores_finite(name):
    masked = torch.cat((HAND, torch.tensor([-math.inf])))[None]
    assert score(name, masked).isfinite().all()
    if name != "entropy":  # ln V counts them
        assert score(name, masked).tolist() == pytest.approx(score(name, HAND[None]).tolist())


@pytest.mark.parametrize("name", CONFIDENCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_states_and_logits_give_finite_scores(name, dtype):
    assert score(name, **a_view(20, dtype=dtype, scale=1e4)).isfinite().all()


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_vocabulary_of_one_is_certain(name):
    assert score(name, torch.tensor([[3.7], [-1e4]])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", CONFIDENCE)
def test_a_score_does_not_depend_on_the_batch(name):
    known = a_view(35)
    together = score(name, **known)
    fitted = known.pop("fitted")
    earlier = known.pop("earlier")
    for i in range(35):
        row = slice(i, i + 1)
        alone = {key: value[row] for key, value in known.items()}
        alone |= {"earlier": Agreement(*(part[row] for part in earlier)), "fitted": fitted}
        if CONFIDENCE[name].needs_gate:  # a matrix product may round by its shape
            torch.testing.assert_close(score(name, **alone), together[row], rtol=1e-5, atol=1e-6)
        else:
            assert score(name, **alone) == together[i]


@pytest.mark.parametrize("name", CONFIDENCE)
def test_any_shape_of_batch_keeps_its_shape(name):
    known = a_view(6)
    shaped = {
        key: value.view(2, 3, -1) for key, value in known.items() if isinstance(value, torch.Tensor)
    }
    earlier = Agreement(*(part.view(2, 3) for part in known["earlier"]))
    scores = score(name, **shaped, earlier=earlier, fitted=known["fitted"])
    torch.testing.assert_close(scores, score(name, **known).view(2, 3))


def test_probabilities_are_never_above_one():
    logits = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0)) * 30
    for name in PROBABILITIES:
        assert score(name, logits).max() <= 1.0
    assert score("max_prob", logits).max() == 1.0


def test_the_names_that_configs_accept_are_those_of_the_measures():
    assert tuple(CONFIDENCE) == CONFIDENCE_NAMES
    for name in CONFIDENCE:
        check_confidence(name)


def test_configs_and_measures_refuse_a_name_with_the_same_sentence():
    sentences = []
    for check in (confidence_named, check_confidence):
        with pytest.raises(ConfigError) as refused:
            check("surety")
        sentences.append(str(refused.value))
    assert sentences[0] == sentences[1]
    assert "got 'surety'" in sentences[0]
