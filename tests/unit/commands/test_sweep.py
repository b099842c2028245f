"""A sweep uses what was fitted to the exits, as decoding does."""

import math
from dataclasses import replace

import pytest
import torch

from offramp import load_corpus
from offramp.commands.sweep import default_thresholds, sweep
from offramp.data import make_tokenizer
from offramp.exits.gate import FittedExits, Gate
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.models.open import open_in_memory


@pytest.fixture
def opened(make_model):
    tokenizer = make_tokenizer("characters", load_corpus("pangram").train)
    model = make_model(vocab_size=tokenizer.get_vocab_size(), exit_layers=(1,), num_hidden_layers=2)
    return open_in_memory(model, tokenizer)


def test_a_temperature_moves_the_same_tokens_in_sweep_and_generate(opened):
    def early(fitted, threshold):
        [row] = sweep(replace(opened, fitted=fitted), "pangram", [threshold])["rows"]
        config = GenerateConfig(threshold=threshold, max_new_tokens=8)
        tokens = list(generate(opened.model, [3, 4, 5], config, fitted=fitted))
        return row["shallow_pct"], sum(token.exit_layer == 1 for token in tokens)

    cold = FittedExits(temperatures={1: 1e-3})
    hot = FittedExits(temperatures={1: 1e3})
    assert early(cold, 0.9) == (pytest.approx(100.0, abs=1.0), 7)
    assert early(hot, 0.9) == (0.0, 0)


def test_the_result_says_what_was_fitted_and_counts_flops(opened):
    fitted = FittedExits(temperatures={1: 2.0})
    content = sweep(replace(opened, fitted=fitted), "pangram", [0.5])
    assert content["temperatures"] == {1: 2.0}
    assert content["rows"][0]["flops_pct"] > content["rows"][0]["compute_pct"]


def test_default_thresholds_are_in_the_unit_of_the_measure():
    assert max(default_thresholds("gain")) < 0
    assert default_thresholds("patience") == (1.0, 2.0, 3.0)
    assert default_thresholds("margin") == default_thresholds("max_prob")


def test_without_a_name_a_threshold_means_the_same_in_sweep_and_generate(opened):
    torch.manual_seed(0)
    gate = Gate(16, hidden=8).requires_grad_(False)
    torch.nn.init.normal_(gate.out_proj.weight, std=2.0)
    opened = replace(opened, fitted=FittedExits(gates={"gain": {1: gate}}))
    content = sweep(opened, "pangram", [0.5, -0.7])
    assert content["confidence"] == "gain"
    bounds = [row["threshold"] for row in content["rows"]]
    assert bounds == [math.log(0.5), -0.7]
    for written, bound in ((0.5, bounds[0]), (-0.7, bounds[1])):
        config = GenerateConfig(threshold=written, max_new_tokens=30)
        rule = generate(opened.model, [3, 4, 5], config, fitted=opened.fitted).rule
        assert (rule.confidence, rule.policy.thresholds) == ("gain", (bound,))
    assert sweep(opened, "pangram", [0.5], confidence="max_prob")["confidence"] == "max_prob"
    assert sweep(opened, "pangram")["confidence"] == "gain"
