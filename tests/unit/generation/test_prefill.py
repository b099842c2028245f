"""Prefill: the numbers of a prompt, and what runs for them."""

import math

import pytest
import torch

from offramp.generation import prefill as prefills
from offramp.generation.prefill import Prefill
from offramp.models.base import FEW_TOKENS, Step


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("source", [None, 2])
def test_a_prompt_has_the_same_numbers_however_its_prefill_is_cut(
    make_model, monkeypatch, chunk, source
):
    monkeypatch.setattr(prefills, "PREFILL_CHUNK", chunk)
    model = make_model(num_hidden_layers=4, exit_layers=(1,), kv_source_layer=source)
    prompt = [n % 13 for n in range(23)]
    found = []
    for budget, slots in ((math.inf, 1), (3, 1), (40, 2)):
        cache = model.make_cache(slots, 30)
        rows = None if slots == 1 else torch.tensor([1])
        part = Prefill(model, cache, prompt, rows=rows)
        while part.logits is None:
            part.run(budget)
        found.append(part.logits)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    whole = model(torch.tensor([prompt]))[:, -1]
    torch.testing.assert_close(found[0], whole)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("tokens", [1, 16, 17, 23])
def test_the_last_block_runs_for_the_last_token_of_a_prompt_only(
    make_model, monkeypatch, layers, tokens
):
    monkeypatch.setattr(prefills, "PREFILL_CHUNK", 8)
    model = make_model(num_hidden_layers=layers, exit_layers=())
    prompt = [n % 13 for n in range(tokens)]
    whole, cache = model.make_cache(1, 30), model.make_cache(1, 30)
    step = Step(positions=torch.arange(tokens)[None], cache=whole)
    h = model.embed(torch.tensor([prompt]), step=step)
    h = model.run_layers(h, 0, layers, step=step)
    ran, run_layers = dict.fromkeys(range(layers), 0), model.run_layers

    def counted(h, start, stop, **arguments):
        for layer in range(start, stop):
            ran[layer] += h.shape[1]
        return run_layers(h, start, stop, **arguments)

    model.run_layers = counted
    part = Prefill(model, cache, prompt)
    part.run(math.inf)
    last = tokens if tokens <= FEW_TOKENS else 1
    assert ran == dict.fromkeys(range(layers - 1), tokens) | {layers - 1: last}
    torch.testing.assert_close(part.logits, model.unembed(h[:, -1:], layers)[:, 0])
    for one, other in ((cache.keys, whole.keys), (cache.values, whole.values)):
        torch.testing.assert_close(one[..., :tokens, :], other[..., :tokens, :])


def test_a_budget_stops_a_prompt_of_a_model_of_one_block_after_each_chunk(make_model, monkeypatch):
    monkeypatch.setattr(prefills, "PREFILL_CHUNK", 20)
    model = make_model(num_hidden_layers=1, exit_layers=())
    part = Prefill(model, model.make_cache(1, 50), [n % 13 for n in range(45)])
    calls = 0
    while part.logits is None:
        assert part.run(5) <= 0
        calls += 1
    assert calls == 3
