"""The threshold at which a given share of the layers runs comes from traces and one batch."""

import numpy as np
import pytest
import torch

from offramp.commands.bench import threshold as module
from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.task import Task
from offramp.commands.bench.threshold import threshold_for
from offramp.errors import ConfigError
from offramp.exits.gate import FittedExits, Gate
from offramp.exits.policy import ThresholdPolicy

EXITS, LAYERS = (1, 2, 4), 6


def fitted():
    """Random gates of gain whose scores differ between tokens."""
    torch.manual_seed(0)
    gates = {}
    for index, layer in enumerate(EXITS):
        gates[layer] = Gate(64, outputs=len(EXITS) - index, hidden=24).requires_grad_(False)
        torch.nn.init.normal_(gates[layer].out_proj.weight, std=0.5)
    return FittedExits(gates={"gain": gates})


@pytest.fixture
def task_with(make_model, make_ids):
    def make(prompts=6, length=12, new=24):
        model = make_model(
            dtype=torch.float32, hidden_size=64, num_hidden_layers=LAYERS, exit_layers=EXITS
        )
        with torch.inference_mode():
            model.model.embed_tokens.weight.mul_(30)
        config = BenchConfig(prompts=prompts, prompt_tokens=length, max_new_tokens=new)
        batches = [[prompt] for prompt in make_ids(prompts, length).tolist()]
        return Task(model=model, fitted=fitted(), config=config, prompts=batches)

    return make


@pytest.mark.parametrize("wanted", [20, 40, 60, 80, 99])
@pytest.mark.parametrize("ties", [False, True])
def test_the_share_at_a_threshold_is_that_of_the_policy(task_with, wanted, ties):
    task = task_with()
    scores = np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)
    if ties:
        scores = scores.round(1)

    def share(threshold):
        last = np.full((1, 200), np.inf, np.float32)
        leaves = ThresholdPolicy.of(float(threshold), 4).leaving(scores)
        every = np.vstack([leaves, last > 0])[: len(EXITS) + 1]
        return 100 * np.array([*EXITS, LAYERS])[every.argmax(axis=0)].mean() / LAYERS

    found = share(module._threshold(wanted, task, scores))
    reached = [share(each) for each in np.unique(scores)]
    best = min(reached, key=lambda each: abs(each - wanted))
    assert abs(found - wanted) <= abs(best - wanted) + 0.5


@pytest.mark.parametrize("confidence", ["gain", "max_prob"])
@pytest.mark.parametrize("wanted", [40.0, 70.0])
def test_a_few_prompts_are_decoded_together_and_the_share_is_about_right(
    task_with, monkeypatch, confidence, wanted
):
    task, decoded = task_with(), []
    decode = module.generate_batch

    def noted(model, prompts, config, **about):
        decoded.append(len(prompts))
        return decode(model, prompts, config, **about)

    monkeypatch.setattr(module, "generate_batch", noted)
    found = threshold_for(wanted, task, confidence)
    assert set(decoded) == {6}
    assert len(decoded) <= 6
    method = task.method("", threshold=found, confidence=confidence)
    samples = [method.run(batch) for batch in task.prompts]
    layers = sum(each.work.layers_run for each in samples) / sum(each.count for each in samples)
    assert 100 * layers / LAYERS == pytest.approx(wanted, abs=8)


def test_the_next_threshold_lies_between_those_that_were_too_low_and_too_high():
    tried = [(70.0, 0.8), (40.0, 0.2), (64.0, 0.6), (55.0, 0.4)]
    assert module._between(0.5, tried, 60.0) == 0.5
    assert module._between(0.3, tried, 60.0) == module._between(0.9, tried, 60.0) == 0.5
    assert module._between(0.9, tried[:1], 60.0) == 0.9
    assert module._between(0.123456, [], 60.0) == 0.1235


def test_prompts_of_one_token_are_one_text(task_with):
    assert np.isfinite(threshold_for(50.0, task_with(length=1), "max_prob"))
    with pytest.raises(ConfigError, match="prompt_tokens: expected at least 2 with one prompt"):
        threshold_for(50.0, task_with(prompts=1, length=1), "max_prob")
