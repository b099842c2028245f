"""The seconds of decoding: what is decoded, and at which exits; no test asserts a time."""

import numpy as np
import pytest
import torch

from offramp.exits.gate import FittedExits, Gate
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.confident_exit import ExitDecoder, ExitRule
from offramp.generation.decoding_time import ReplayedExits, decoding_time, representative_exits


@pytest.fixture
def steps(monkeypatch):
    """What ``decoding_time`` decoded, step by step."""
    seen = []
    whole = ExitDecoder.decode_one_token

    def watched(self, ids, rows):
        found = whole(self, ids, rows)
        seen.append((list(ids), found.exit_layers))
        return found

    monkeypatch.setattr(ExitDecoder, "decode_one_token", watched)
    return seen


def test_the_tokens_of_the_text_are_decoded_after_the_prompt(make_model, steps):
    model = make_model(exit_layers=(1,))
    texts = torch.arange(12).view(2, 6)
    took = decoding_time(model, texts, prompt_tokens=4)
    assert [ids for ids, _ in steps] == [[4, 10], [5, 11]]
    assert took.tokens == 4
    assert took.layers_run == 4 * 3
    assert took.mean_layers == 3
    assert took.first_seconds > 0
    assert took.tokens_per_s > 0


@pytest.mark.parametrize("confidence", ["max_prob", "gain"])
@pytest.mark.parametrize("source", [None, 1])
def test_tokens_leave_where_they_left_before(make_model, steps, confidence, source):
    model = make_model(exit_layers=(1, 2), kv_source_layer=source)
    exits = np.array([[0, 2, 1, 0], [1, 0, 2, 2], [2, 0, 0, 1]])
    policy = ThresholdPolicy(thresholds=(0.5, 0.5))
    if confidence == "gain":
        policy = GainPolicy(price=0.1, costs=(30.0, 60.0, 100.0))
    gates = {layer: Gate(16, outputs=3 - layer).eval() for layer in (1, 2)}
    rule = ReplayedExits(
        policy=policy,
        confidence=confidence,
        fitted=FittedExits(gates={"gain": gates}),
        exits=exits,
    )
    took = decoding_time(model, torch.zeros(3, 9, dtype=torch.long), prompt_tokens=5, rule=rule)
    assert [layers for _, layers in steps] == [[1, 2, 3], [3, 1, 1], [2, 3, 1], [1, 3, 2]]
    assert took.layers_run == (exits + 1).sum()


def test_a_rule_of_its_own_decides_on_the_text(make_model, steps):
    model = make_model(exit_layers=(1,))
    rule = ExitRule(policy=ThresholdPolicy(thresholds=(-np.inf,)))
    decoding_time(model, torch.zeros(1, 5, dtype=torch.long), prompt_tokens=3, rule=rule)
    assert [layers for _, layers in steps] == [[1], [1]]


def test_stretches_are_as_deep_as_the_whole_text():
    exits = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1]])
    assert exits.mean() == pytest.approx(8 / 18)
    found = representative_exits(exits, (1, 3), rows=2, tokens=2)
    assert found.tolist() == [[0, 1], [1, 0]]  # the first windows of a mean of 0.5
    assert representative_exits(exits, (1, 3), rows=4, tokens=2).tolist()[2:] == [[0, 0], [0, 1]]
    assert representative_exits(exits, (1, 3), rows=1, tokens=6).tolist() == [[0, 0, 0, 1, 1, 1]]
