"""Without a name, gain decides where it was fitted; thresholds keep one meaning."""

import math

import pytest
import torch

from offramp.errors import ConfigError
from offramp.exits.default_confidence import confidence_and_threshold, default_confidence, in_nats
from offramp.exits.gate import FittedExits, Gate
from offramp.exits.policy import GainPolicy
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.generation.options import exit_rule

EXITS = (1, 2, 3)


def fitted(*layers):
    gates = {layer: Gate(16, outputs=3 - layer).requires_grad_(False) for layer in layers}
    return FittedExits(gates={"gain": gates})


def test_gain_is_the_default_where_every_early_exit_has_its_gate():
    assert default_confidence(fitted(1, 2), EXITS) == "gain"
    for of in (fitted(), fitted(1)):
        assert default_confidence(of, EXITS) == "max_prob"
    assert default_confidence(fitted(1, 2), (3,)) == "max_prob"


@pytest.mark.parametrize(
    ("threshold", "nats"),
    [
        (0.9, math.log(0.9)),
        (1.0, 0.0),
        (0.0, -math.inf),
        (-0.05, -0.05),
        (2.0, 2.0),
        (math.inf,) * 2,
    ],
)
def test_a_threshold_on_gain_is_a_share_of_probability_or_nats(threshold, nats):
    assert in_nats(threshold) == nats
    about = {"fitted": fitted(1, 2), "exit_layers": EXITS}
    assert confidence_and_threshold(None, threshold, **about) == ("gain", nats)
    assert confidence_and_threshold(None, (threshold, 0.5), **about)[1] == (nats, math.log(0.5))
    for name in ("gain", "max_prob", "gate"):  # by name it is in the measure's own unit
        assert confidence_and_threshold(name, threshold, **about) == (name, threshold)
    about["fitted"] = fitted()
    assert confidence_and_threshold(None, threshold, **about) == ("max_prob", threshold)


def test_generate_follows_the_default(make_model):
    model = make_model(exit_layers=(1, 2), dtype=torch.float32)

    def rule(policy=None, of=None, **options):
        of = fitted(1, 2) if of is None else of
        return exit_rule(model, GenerateConfig(**options), policy=policy, fitted=of)

    found = rule(threshold=0.9)
    assert (found.confidence, found.policy.thresholds) == ("gain", (math.log(0.9),) * 2)
    assert rule(threshold=0.9, of=fitted()).confidence == "max_prob"
    assert rule(threshold=0.9, confidence="max_prob").policy.thresholds == (0.9, 0.9)
    assert (
        rule(threshold=0.9, decay=2.0).confidence == "max_prob"
    )  # CALM's decay is of probabilities
    assert rule(policy=GainPolicy(price=0.1, costs=(1.0, 2.0, 3.0))).confidence == "gain"
    with pytest.raises(ConfigError, match="expected a fitted gate at exit layer 1"):
        rule(threshold=0.9, confidence="gate")
    config = GenerateConfig(max_new_tokens=3, threshold=0.9)
    generation = generate(model, [1, 2], config, fitted=fitted(1, 2))
    assert generation.rule.confidence == "gain"
    assert GenerateConfig(speculative=True).draft_confidence == "max_prob"
