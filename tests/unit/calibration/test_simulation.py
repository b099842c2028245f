"""A certified step keeps its promise over simulated draws, and the classic mistakes do not.

The risk of every step is known; a sequence's loss comes from a number of its own (how hard it
is), so its tokens are correlated, and a sequence hard at one step is hard at the next.
"""

import math

import numpy as np
import pytest

from offramp.calibration.bounds import (
    conformal_steps,
    fixed_sequence,
    hoeffding_bentkus,
    p_values,
)
from offramp.calibration.certify import certify
from offramp.calibration.promise import Promise
from offramp.evaluation.trace import ExitTrace

DRAWS = 1000
DELTA = 0.05
ALLOWED = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)  # three standard errors
TOKENS = 32

CURVES = {  # risk of each step of the path, in units of epsilon
    "fine": np.linspace(0.1, 2.0, 20),
    "coarse": np.array([0.05, 0.3, 1.4, 2.0, 3.0]),
    "not monotone": np.array([0.1, 0.5, 1.2, 0.2, 0.4, 1.6]),
    "just above from the start": np.array([1.02, 1.05, 1.1]),
}
SIZES = [(n, epsilon) for n in (100, 300, 1000) for epsilon in (0.02, 0.05, 0.1, 0.2)]


def draw_means(risks, n, *, seed, spread):
    """(draws, steps): mean losses of n sequences whose expected loss is ``risks``.

    ``spread`` says what a sequence is like: "whole", all tokens are lost or none (what the bound
    must survive), or "part", a share of them is, different from sequence to sequence.
    """
    random = np.random.default_rng(seed)
    hardness = np.sort(random.random((DRAWS, n)), axis=1)
    if spread == "whole":
        lost = [np.searchsorted(row, risks) for row in hardness]
        return np.array(lost) / n
    shares = [np.clip(2 * risk * hardness, 0, 1) for risk in risks]  # their mean is the risk
    return np.stack([np.round(share * TOKENS).mean(axis=1) / TOKENS for share in shares], axis=1)


def certified(means, n, epsilon):
    return fixed_sequence(hoeffding_bentkus(means, n, epsilon), DELTA)


def first_uncertified(means, n, epsilon):
    """The mistake of returning where the search stopped."""
    return np.minimum(certified(means, n, epsilon) + 1, means.shape[1])


def tokens_as_independent(means, n, epsilon):
    """The mistake of counting tokens where sequences are what was drawn."""
    return certified(means, n * TOKENS, epsilon)


def broken_share(procedure, curve, n, epsilon, *, spread="whole", seed=0):
    """How often the step that the procedure returns has a risk above epsilon."""
    risks = CURVES[curve] * epsilon
    steps = procedure(draw_means(risks, n, seed=seed, spread=spread), n, epsilon)
    broken = (steps > 0) & (risks[steps - 1] > epsilon)
    return float(broken.mean())


def check_promise(procedure):
    """What every procedure is held to."""
    for curve in CURVES:
        for n, epsilon in SIZES:
            share = broken_share(procedure, curve, n, epsilon)
            assert share <= ALLOWED, f"{curve}, n {n}, epsilon {epsilon}: broken in {share:.1%}"


def test_the_certified_step_keeps_its_promise():
    check_promise(certified)


def test_it_keeps_it_where_a_part_of_each_sequence_is_lost():
    for n, epsilon in SIZES:
        assert broken_share(certified, "fine", n, epsilon, spread="part") <= ALLOWED


@pytest.mark.parametrize("mistake", [first_uncertified, tokens_as_independent])
def test_the_same_check_catches_the_classic_mistakes(mistake):
    with pytest.raises(AssertionError, match="broken in"):
        check_promise(mistake)


# The other tests, on the losses themselves.

SHARPER = ("betting", "empirical-bernstein")
FEW = [(100, 0.05), (100, 0.2), (300, 0.02)]


def draw_losses(risks, n, *, seed, spread):
    """(draws, n, steps): losses of n sequences whose expected loss is ``risks``.

    "whole" and "part" are as in ``draw_means``. Under "skewed" most sequences lose next to nothing
    and few lose nearly all, and the tokens of a sequence are lost independently given its share.
    """
    random = np.random.default_rng(seed)
    hardness = random.random((DRAWS, n, 1))
    if spread == "whole":
        return (hardness < risks).astype(np.float64)
    if spread == "part":
        return np.round(np.clip(2 * risks * hardness, 0, 1) * TOKENS) / TOKENS
    shares = hardness ** (1 / np.asarray(risks) - 1)  # the mean of U^k is 1 / (k + 1)
    return random.binomial(TOKENS, shares) / TOKENS


def check_losses_promise(procedure, curves, spreads, sizes):
    """What every procedure on losses is held to."""
    for curve in curves:
        for n, epsilon in sizes:
            risks = CURVES[curve] * epsilon
            for spread in spreads:
                steps = procedure(draw_losses(risks, n, seed=1, spread=spread), epsilon)
                broken = float(((steps > 0) & (risks[steps - 1] > epsilon)).mean())
                what = f"{curve}, n {n}, epsilon {epsilon}, {spread}"
                assert broken <= ALLOWED, f"{what}: broken in {broken:.1%}"


@pytest.mark.parametrize("test", SHARPER)
def test_the_step_that_a_sharper_test_certifies_keeps_its_promise(test):
    check_losses_promise(
        lambda losses, epsilon: fixed_sequence(
            p_values(losses, epsilon, delta=DELTA, test=test), DELTA
        ),
        ("just above from the start", "coarse"),
        ("whole", "part", "skewed"),
        FEW,
    )


@pytest.mark.parametrize("test", SHARPER)
def test_the_same_check_catches_tokens_taken_as_independent(test):
    """Sixteen pieces of every sequence, each with the sequence's loss."""
    with pytest.raises(AssertionError, match="broken in"):
        check_losses_promise(
            lambda losses, epsilon: fixed_sequence(
                p_values(np.repeat(losses, 16, axis=1), epsilon, delta=DELTA, test=test), DELTA
            ),
            ("just above from the start",),
            ("whole",),
            FEW[:1],
        )


def test_it_certifies_what_can_be():
    """A promise that is kept by never leaving would be no use."""
    means = draw_means(CURVES["fine"] * 0.1, 1000, seed=0, spread="whole")
    reached = CURVES["fine"][certified(means, 1000, 0.1) - 1]
    assert np.median(reached) >= 0.7


def test_the_promise_nearly_fails_at_the_edge():
    """The bound is not loose: a risk a hair above epsilon is certified now and then."""
    share = broken_share(certified, "just above from the start", 1000, 0.2)
    assert 0.001 <= share <= DELTA


def test_conformal_risk_control_keeps_its_promise_on_average():
    """The mean over draws of the returned step's risk is at most epsilon, and near it."""
    for n, epsilon in [(100, 0.05), (300, 0.1)]:
        risks = np.linspace(0.02, 2.0, 100) * epsilon
        random = np.random.default_rng(0)
        losses = random.random((DRAWS, n, 1)) < risks
        steps = conformal_steps(losses, epsilon)
        mean = np.where(steps > 0, risks[steps - 1], 0.0).mean()
        assert 0.8 * epsilon <= mean <= epsilon


# The same through ``certify``, from a trace.


def make_trace(hardness, risks):
    """Sequences of 16 tokens; at step j a token disagrees where its sequence's hardness < risk_j.

    The score of a token is how many steps leave it alone, so step j lets leave exactly those that
    the risk is about, and some that agree.
    """
    sequences = len(hardness)
    first = np.searchsorted(risks, hardness)  # the step at which the sequence begins to fail
    scores = np.repeat(-np.minimum(first, len(risks)), 16).astype(np.float32)
    disagrees = np.repeat(first < len(risks), 16)
    tokens = 16 * sequences
    return ExitTrace(
        num_layers=2,
        exit_layers=(1, 2),
        targets=np.zeros(tokens, dtype=np.int64),
        nll=np.zeros((2, tokens), dtype=np.float32),
        argmax=np.stack([disagrees, np.zeros(tokens)]).astype(np.int64),
        confidence={"max_prob": np.stack([scores, scores])},
        sequence=np.repeat(np.arange(sequences), 16).astype(np.int32),
        position=np.tile(np.arange(16), sequences).astype(np.int32),
    )


def certified_index(trace, path, epsilon):
    found = certify(trace, Promise(epsilon=epsilon), model_sha256="", corpus_sha256="", path=path)
    return -1 if found.is_full_model else path.index(found.thresholds)


def pairs(trace):
    """The mistake of cutting what was drawn as one into independent pieces."""
    pieces = np.arange(trace.num_tokens, dtype=np.int32) // 2
    return ExitTrace(**{**vars(trace), "sequence": pieces})


def test_certify_keeps_the_promise_and_would_not_with_either_mistake():
    epsilon, n, draws = 0.1, 150, 400
    allowed = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / draws)
    risks = np.array([0.01, 0.03, 0.101, 0.13])
    path = [(-float(step),) for step in range(4)]
    random = np.random.default_rng(0)
    broken = {"certified": 0, "first uncertified": 0, "independent": 0}
    for _ in range(draws):
        trace = make_trace(random.random(n), risks)
        index = certified_index(trace, path, epsilon)
        split = certified_index(pairs(trace), path, epsilon)
        broken["certified"] += risks[index] > epsilon if index >= 0 else 0
        broken["first uncertified"] += risks[min(index + 1, 3)] > epsilon
        broken["independent"] += risks[split] > epsilon if split >= 0 else 0
    assert broken["certified"] <= allowed * draws
    assert broken["first uncertified"] > allowed * draws
    assert broken["independent"] > allowed * draws
