import math
from dataclasses import replace

import numpy as np
import pytest

from offramp.calibration.bounds import hoeffding_bentkus
from offramp.calibration.certify import certify
from offramp.calibration.promise import Promise
from offramp.calibration.risk import check_path, sequence_losses, threshold_path, token_losses
from offramp.errors import ConfigError, CorpusError
from offramp.evaluation.cost import ModelCost
from offramp.evaluation.trace import ExitTrace
from offramp.exits.confidence import CONFIDENCE

COST = ModelCost(exit_layers=(1, 2), context=1.0, layers=(4.0, 4.0), heads={1: 1.0, 2: 1.0})


def sealed(trace, promise, **chosen):
    return certify(trace, promise, model_sha256="m", corpus_sha256="c", **chosen)


@pytest.fixture
def by_hand():
    """Two sequences of 3 tokens, exits after 1 and 2 of 3 layers."""
    return ExitTrace(
        num_layers=3,
        exit_layers=(1, 2, 3),
        targets=np.zeros(6, dtype=np.int64),
        nll=np.array([[1, 2, 3, 1, 1, 9], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]], np.float32),
        argmax=np.array([[5, 6, 6, 5, 5, 6], [5, 5, 6, 5, 5, 6], [5, 5, 5, 5, 5, 5]]),
        confidence={
            "max_prob": np.array(
                [[0.9, 0.8, 0.2, 0.9, 0.1, 0.1], [0.9, 0.9, 0.5, 0.9, 0.9, 0.1], [0] * 6],
                dtype=np.float32,
            )
        },
        sequence=np.array([0, 0, 0, 1, 1, 1], dtype=np.int32),
        position=np.array([0, 1, 2] * 2, dtype=np.int32),
    )


def test_the_losses_of_tokens_by_hand(by_hand):
    disagreement = token_losses(by_hand, "disagreement")
    assert disagreement.tolist() == [[0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 1], [0] * 6]
    gap = token_losses(by_hand, "nll-gap", bound=4.0)
    assert gap.tolist() == [[0, 0.25, 0.5, 0, 0, 1], [0] * 6, [0] * 6]  # better is no loss less


def test_the_losses_of_sequences_by_hand(by_hand):
    path = ((math.inf, math.inf), (math.inf, 0.5), (0.85, 0.5), (0.0, 0.0))
    found = sequence_losses(by_hand, path, confidence="max_prob", risk="disagreement")
    assert found.tolist() == [[0, 1 / 3, 1 / 3, 2 / 3], [0, 0, 0, 1 / 3]]
    found = sequence_losses(by_hand, path, confidence="max_prob", risk="nll-gap", bound=4.0)
    assert found[:, -1].tolist() == pytest.approx([0.75 / 3, 1 / 3])


def test_an_exit_that_diverged_loses_the_whole_bound(by_hand):
    nll = by_hand.nll.copy()
    nll[0, 0] = np.inf
    assert token_losses(replace(by_hand, nll=nll), "nll-gap", bound=2.0)[0, 0] == 1.0


def test_the_boldest_step_that_passes_is_certified(make_trace):
    trace = make_trace(400)
    path = [(0.95,), (0.9,), (0.8,), (0.5,), (0.0,)]
    promise = Promise(epsilon=0.05, test="hoeffding-bentkus")
    found = sealed(trace, promise, path=path, cost=COST)
    scores = trace.scores("max_prob")[0]
    wrong = trace.argmax[0] == 1
    means = [float((wrong & (scores >= step[0])).mean()) for step in path]
    p_values = [float(hoeffding_bentkus(mean, 400, 0.05)) for mean in means]
    last = max(index for index, p in enumerate(p_values) if p <= 0.05)
    assert 0 < last < 4
    assert found.thresholds == path[last]
    assert found.p_values == pytest.approx(p_values[: last + 2])
    left = float((scores >= path[last][0]).mean())
    assert found.expected_compute_pct == pytest.approx(100 - 50 * left)
    assert found.expected_flops_pct == pytest.approx(100 * (left * 5 + (1 - left) * 10) / 9)
    assert (found.n, found.missing_kv, found.method, found.delta) == (400, "recompute", "ltt", 0.05)
    assert not found.is_full_model


def test_too_few_sequences_give_the_full_model_and_say_how_many_are_needed(make_trace):
    promise = Promise(epsilon=0.05)
    found = sealed(make_trace(58), promise, path=[(2.0,)], cost=COST)
    assert found.is_full_model
    assert found.thresholds == (math.inf,)
    assert (found.expected_compute_pct, found.expected_flops_pct) == (100, 100)
    assert (found.n, promise.sequences_needed) == (58, 59)
    assert not sealed(make_trace(59), promise, path=[(2.0,)]).is_full_model


def test_all_steps_may_pass(make_trace):
    trace = make_trace(400)
    trace.argmax[:] = 0
    assert sealed(trace, Promise(), path=[(0.9,), (0.1,)]).thresholds == (0.1,)


def test_the_test_is_chosen_by_the_number_of_sequences_and_recorded(make_trace):
    promise = Promise(epsilon=0.05)
    for n, test in ((60, "hoeffding-bentkus"), (70, "betting")):
        found = sealed(make_trace(n), promise)
        named = sealed(make_trace(n), replace(promise, test=test))
        assert found.assumptions["test"] == test
        assert found.p_values == named.p_values
    assert "test" not in sealed(make_trace(70), Promise(method="crc")).assumptions


def test_betting_lets_more_tokens_leave(make_trace):
    """On the same losses, whose variance is far below that of 0/1 losses."""
    trace = make_trace(400, length=64)
    classic = sealed(trace, Promise(epsilon=0.05, test="hoeffding-bentkus"))
    sharper = sealed(trace, Promise(epsilon=0.05))
    assert sharper.thresholds < classic.thresholds
    losses = sequence_losses(
        trace, (sharper.thresholds,), confidence="max_prob", risk="disagreement"
    )
    assert losses.mean() < 0.05


def test_conformal_risk_control_is_bolder_and_has_no_delta(make_trace):
    trace = make_trace(400)
    sure = sealed(trace, Promise(epsilon=0.05))
    mean = sealed(trace, Promise(epsilon=0.05, method="crc"))
    assert mean.thresholds < sure.thresholds
    assert (mean.delta, mean.p_values, mean.method) == (None, None, "crc")
    assert "On average" in mean.assumptions["promise"]


def test_several_exits_move_along_one_path(make_trace):
    trace = make_trace(600, exit_layers=(1, 2, 4))
    found = sealed(trace, Promise(epsilon=0.1))
    assert len(set(found.thresholds)) == 1
    assert len(found.thresholds) == 2
    assert 0 < found.thresholds[0] < 1


def test_the_nll_gap_is_promised_in_nats(make_trace):
    """At a bound of 2 nats, 0.04 nats are a loss of 0.02."""
    trace = make_trace(400)
    promise = Promise(risk="nll-gap", epsilon=0.04, bound=2.0, test="hoeffding-bentkus")
    assert promise.sequences_needed == 149
    found = sealed(trace, promise)
    losses = sequence_losses(
        trace, (found.thresholds,), confidence="max_prob", risk="nll-gap", bound=2.0
    )
    assert found.p_values is not None
    assert found.p_values[-2] == pytest.approx(float(hoeffding_bentkus(losses.mean(), 400, 0.02)))
    assert found.bound == 2.0
    assert "2.0 nats" in found.assumptions["promise"]


def test_a_window_cut_off_at_the_end_does_not_count(make_trace):
    trace = make_trace(100, length=8)
    cut = trace.tokens(slice(0, 100 * 8 - 5))
    found = sealed(cut, Promise(epsilon=0.1))
    assert (found.n, found.assumptions["sequence_tokens"]) == (99, 8)


def test_the_certificate_says_what_it_does_not_cover(make_trace):
    found = sealed(make_trace(), Promise())
    assert "Free-running generation" in found.assumptions["not_covered"]
    assert found.assumptions["unit"] == "sequence"
    assert len(found.assumptions["path"]) == 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epsilon": 0.0}, "epsilon: expected a number between 0 and 1, got 0.0"),
        ({"epsilon": 1.0}, "epsilon"),
        ({"delta": 1.0}, "delta"),
        ({"delta": -0.5}, "delta"),
        ({"method": "bonferroni"}, "method: expected one of ltt, crc, got 'bonferroni'"),
        ({"bound": 0.0}, "bound"),
        ({"risk": "nll-gap", "epsilon": 0.5, "bound": 0.5}, "less than the bound of 0.5 nats"),
        ({"risk": "ppl"}, "risk: expected one of disagreement, nll-gap on text, got 'ppl'"),
    ],
)
def test_a_promise_out_of_range_is_a_config_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        Promise(**fields)


def test_sequences_of_one_token_are_a_corpus_error(make_trace):
    with pytest.raises(CorpusError, match="at least 2 tokens, got 1"):
        sealed(make_trace(length=1), Promise())


def test_no_sequences_are_a_corpus_error(make_trace):
    with pytest.raises(CorpusError, match="at least one sequence"):
        sealed(make_trace(sequences=0), Promise())


def test_a_trace_without_sequences_or_without_the_last_layer_is_refused(make_trace):
    with pytest.raises(ConfigError, match="with sequence numbers"):
        sealed(replace(make_trace(), sequence=None), Promise())
    with pytest.raises(ConfigError, match="expected the last layer, 4, among"):
        sealed(make_trace(exit_layers=(1, 2, 4)).at((1, 2)), Promise())


@pytest.mark.parametrize("name", CONFIDENCE)
@pytest.mark.parametrize("exits", [2, 4])
def test_the_usual_path_goes_from_conservative_to_bold(name, exits):
    path = threshold_path(name, exits)
    assert check_path(path, exits) == path
    assert len(path) == (exits - 1 if name == "patience" else 100)
    assert all(len(step) == exits - 1 for step in path)
    assert path[0] > path[-1] or len(path) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "at least one step"),
        ([(0.5, 0.5), (0.6, 0.4)], "from conservative to bold"),
        ([(0.5,)], "thresholds: expected 2"),
        ([(0.5, math.nan)], "nan"),
    ],
)
def test_a_path_that_is_none_is_a_config_error(path, message):
    with pytest.raises(ConfigError, match=message):
        check_path(path, 3)


@pytest.mark.parametrize(
    ("complete_from", "thresholds", "meaning"),
    [
        (None, (0.99, 0.99), "recompute"),
        (4, (0.99, 0.99), "recompute"),
        (4, (math.inf, math.inf), "recompute"),
        (2, (0.99, 0.99), "recompute"),
        (2, (math.inf, 0.99), "exact"),
        (1, (0.99, 0.99), "exact"),
        (1, (math.inf, math.inf), "exact"),
    ],
)
def test_a_certificate_is_exact_if_tokens_leave_only_at_complete_exits(
    make_trace, complete_from, thresholds, meaning
):
    trace = make_trace(400, exit_layers=(1, 2, 4))
    found = certify(
        trace,
        Promise(epsilon=0.5),
        model_sha256="m",
        corpus_sha256="c",
        path=[thresholds],
        complete_from=complete_from,
    )
    assert (found.thresholds, found.missing_kv) == (thresholds, meaning)
