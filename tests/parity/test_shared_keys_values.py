"""Hugging Face models whose last blocks read the keys and values of earlier blocks.

Where no block above an exit writes any, the exit is complete: a token that leaves there has left
all keys and values that later tokens read.
"""

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from offramp.commands.export import shortened
from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.exits.policy import ThresholdPolicy
from offramp.generation.confident_exit import ExitRule
from offramp.generation.config import GenerateConfig
from offramp.generation.forced import forced_exits
from offramp.generation.generate import generate
from offramp.models.base import Step, whole_step
from offramp.models.huggingface.exits_file import from_pretrained
from offramp.models.propagate import run_propagated

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "Gemma4TextConfig"):
    pytest.skip("before Gemma 4, Gemma 3n passed other things on", allow_module_level=True)

LAYERS, SHARED, WINDOW, LENGTH, ROUTED = 6, 3, 4, 14, 12
COMPLETE = LAYERS - SHARED
FIELDS = {
    "vocab_size": 61,
    "vocab_size_per_layer_input": 61,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "hidden_size_per_layer_input": 6,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": SHARED,
    "pad_token_id": 0,
}
CONFIGS = {
    "gemma3n": (
        "Gemma3nTextConfig",
        {"laurel_rank": 5, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]},
    ),
    "gemma3n, two states": ("Gemma3nTextConfig", {"altup_num_inputs": 2, "laurel_rank": 5}),
    "gemma4": ("Gemma4TextConfig", {"global_head_dim": 16, "use_double_wide_mlp": True}),
    "gemma4, one global head": (
        "Gemma4TextConfig",
        {"global_head_dim": 16, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
}
NEAR = {torch.float32: 1e-4, torch.float64: 1e-10}


@cache
def opened(name, dtype=torch.float32):
    kind, fields = CONFIGS[name]
    if not hasattr(transformers, kind):
        pytest.skip("is not in this version")
    config = getattr(transformers, kind)(**deepcopy({**FIELDS, **fields}))
    torch.manual_seed(0)
    with torch.no_grad():
        lm = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = from_pretrained(lm.to(dtype), exit_layers=range(1, LAYERS + 1))
    if model.why_no_blocks:
        pytest.skip("does not run block by block in this version")
    model.silence_untrained()
    return model


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(params=NEAR, ids=str)
def model(name, request):
    return opened(name, request.param)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def ids_of(rows, length=LENGTH, seed=1):
    return torch.randint(1, 61, (rows, length), generator=torch.manual_seed(seed))


def close(model, actual, expected):
    assert_close(actual, expected, rtol=0, atol=NEAR[model.dtype])


def own_logits(model, ids):
    return model.backbone(input_ids=ids).logits


def test_the_cache_has_a_layer_for_each_block_that_writes(model):
    assert model.complete_from == COMPLETE
    cache = model.make_cache(2, 10)
    assert len(cache.keys) == len(cache.values) == COMPLETE


def test_each_block_gives_the_states_of_the_whole_model(model):
    ids = ids_of(2)
    logits = {
        layer: model.unembed(h, layer)
        for layer, h in model.states_at(ids, [LAYERS], step=whole_step(ids))
    }
    close(model, logits[LAYERS], own_logits(model, ids))


def test_a_prompt_runs_to_the_completeness_layer_and_only_its_last_token_above(model):
    """All tokens leave at ``complete_from``; a new step then goes on with the last one."""
    ids = ids_of(2)
    expected = own_logits(model, ids)
    cache = model.make_cache(2, LENGTH)
    positions = torch.arange(LENGTH)[None]
    step = Step(positions=positions, cache=cache)
    h = model.run_layers(model.embed(ids, step=step), 0, COMPLETE, step=step)
    written = cache.keys.clone(), cache.values.clone(), cache.lengths.clone()
    model.project_kv(h, COMPLETE, LAYERS, step=step)
    last = Step(positions=positions[:, -1:], cache=cache)
    out = model.run_layers(h[:, -1:], COMPLETE, LAYERS, step=last)
    close(model, model.unembed(out, LAYERS), expected[:, -1:])
    for before, after in zip(written, (cache.keys, cache.values, cache.lengths), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_prompt_then_other_rows_in_another_order_equal_rows_alone(model, side):
    rows = [ids_of(1, n + 3, seed=n)[0] for n in (9, 5, 2)]
    ids, real = torch.full((3, 9), 11), torch.zeros(3, 9, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(row) - 3
        at = slice(0, n) if side == "right" else slice(9 - n, None)
        ids[i, at], real[i, at] = row[:n], True
    cache = model.make_cache(3, 12)
    whole = whole_step(ids, real=real)
    step = Step(positions=whole.positions, real=real, cache=cache)
    h = model.run_layers(model.embed(ids, step=step), 0, LAYERS, step=step)
    for i, row in enumerate(rows):
        expected = own_logits(model, row[None, :-3])[0]
        close(model, model.unembed(h, LAYERS)[i, real[i]], expected)
    order = [2, 0]
    for t in range(3):
        positions = torch.tensor([[len(rows[i]) - 3 + t] for i in order])
        step = Step(positions=positions, cache=cache, rows=torch.tensor(order))
        token = torch.stack([rows[i][len(rows[i]) - 3 + t, None] for i in order])
        h = model.embed(token, step=step)
        for start, stop in ((0, 2), (2, COMPLETE), (COMPLETE, 5), (5, LAYERS)):
            again = Step(positions=positions, cache=cache, rows=torch.tensor(order))
            h = model.run_layers(h, start, stop, step=again)
        for at, i in enumerate(order):
            expected = own_logits(model, rows[i][None, : len(rows[i]) - 2 + t])[0, -1]
            close(model, model.unembed(h, LAYERS)[at, 0], expected)


def routed(model, threshold, exits, missing_kv):
    """Exit layers and logits of two rows that leave at different times."""
    model.exit_layers = exits
    ids = ids_of(2, ROUTED, seed=5)
    policy = ThresholdPolicy.of(threshold, len(exits))
    rule = ExitRule(policy=policy, confidence="max_prob")
    return forced_exits(model, ids, rule, missing_kv=missing_kv)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_exits_at_and_above_the_completeness_layer_do_not_know_missing_kv(name, dtype):
    model = opened(name, dtype)
    found = [
        routed(model, 0.05, (COMPLETE, COMPLETE + 1, LAYERS), kind)
        for kind in ("recompute", "propagate")
    ]
    (logits, layers), (others, other_layers) = found
    assert torch.equal(layers, other_layers)
    close(model, logits, others)
    ids = ids_of(2, ROUTED, seed=5)
    states = dict(model.states_at(ids, (COMPLETE, COMPLETE + 1, LAYERS), step=whole_step(ids)))
    for layer in layers.unique().tolist():
        here = layers == layer
        close(model, logits[here], model.unembed(states[layer], layer)[here])


def test_the_thresholds_above_route_rows_apart():
    _, layers = routed(opened("gemma4"), 0.05, (COMPLETE, COMPLETE + 1, LAYERS), "recompute")
    assert len(layers.unique()) > 1
    assert not torch.equal(layers[0], layers[1])


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_an_exit_below_the_completeness_layer_knows_missing_kv(name):
    model, exits = opened(name), (1, COMPLETE, LAYERS)
    whole, left = (routed(model, 0.05, exits, kind)[0] for kind in ("recompute", "propagate"))
    assert (whole - left).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_decoding_under_propagate_is_its_definition_on_whole_sequences(name):
    model = opened(name, torch.float64)
    exits = (1, 2, COMPLETE, 5, LAYERS)
    logits, layers = routed(model, 0.05, exits, "propagate")
    policy = ThresholdPolicy.of(0.05, len(exits))

    def leaves(layer, h, _previous):
        score = model.unembed(h, layer).softmax(dim=-1).amax(dim=-1)
        return policy.leaves(exits.index(layer), score)

    ids = ids_of(2, ROUTED, seed=5)
    h, expected = run_propagated(model, ids, leaves, step=whole_step(ids))
    assert torch.equal(layers, expected)
    for layer in layers.unique().tolist():
        here = layers == layer
        close(model, logits[here], model.unembed(h, layer)[here])


@pytest.mark.parametrize("draft_exit", [1, COMPLETE, COMPLETE + 1])
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_speculation_gives_the_greedy_text(name, draft_exit):
    model = opened(name)
    model.exit_layers = tuple(range(1, LAYERS + 1))
    prompt = ids_of(1, 7)[0].tolist()
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(own_logits(model, torch.tensor([ids]))[0, -1].argmax()))
    config = GenerateConfig(
        max_new_tokens=12,
        speculative=True,
        draft_exit=draft_exit,
        draft_threshold=0.0,
        adaptive=False,
    )
    assert [token.id for token in generate(model, prompt, config)] == ids[len(prompt) :]


def test_a_cropped_cache_forgets_ids_and_keys(model):
    ids, other = ids_of(1), ids_of(1, seed=2)
    cache = model.make_cache(1, LENGTH)
    for row, start in ((ids, 0), (other, 5)):
        cache.crop(start)
        step = Step(positions=torch.arange(start, LENGTH)[None], cache=cache)
        h = model.run_layers(model.embed(row[:, start:], step=step), 0, LAYERS, step=step)
    expected = own_logits(model, torch.cat((ids[:, :5], other[:, 5:]), dim=1))[:, 5:]
    close(model, model.unembed(h, LAYERS), expected)


def test_tokens_that_were_never_embedded_are_refused(name):
    model = opened(name)
    h = torch.zeros(1, 2, model.hidden_size)
    for kv_cache in (None, model.make_cache(1, 8)):
        step = Step(positions=torch.arange(2)[None], cache=kv_cache)
        with pytest.raises(ConfigError, match="for which embed was called"):
            model.run_layers(h, 0, 1, step=step)


def test_a_step_without_the_shared_keys_and_values_is_refused(name):
    model = opened(name)
    ids = ids_of(1, 3)
    step, below = whole_step(ids), whole_step(ids)
    h = model.run_layers(model.embed(ids, step=below), 0, COMPLETE, step=below)
    model.embed(ids, step=step)
    with pytest.raises(ConfigError, match="keeps the keys and values that blocks share"):
        model.run_layers(h, COMPLETE, LAYERS, step=step)


@pytest.mark.parametrize("layer", [COMPLETE, COMPLETE + 1])
def test_export_of_layers_that_are_no_model_of_their_own_is_refused(name, layer):
    with pytest.raises(UnsupportedArchitectureError, match="are no smaller model of its kind"):
        shortened(opened(name), layer)


@torch.enable_grad()
def test_gradients_reach_the_block_whose_keys_and_values_are_read(name):
    model = opened(name)
    ids = ids_of(2, 6)
    embed, step = model.embed(ids, step=(step := whole_step(ids))), step
    h = model.run_layers(embed, 0, COMPLETE, step=step).detach()
    out = model.run_layers(h, COMPLETE, LAYERS, step=step)
    attention = model._layout.block_modules[COMPLETE - 1].self_attn
    [grad] = torch.autograd.grad(out.square().sum(), [attention.k_proj.weight])
    assert grad.abs().max() > 0
