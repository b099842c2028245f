"""Training a model whose upper blocks share keys and values, with every option of training."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from offramp.errors import ConfigError
from offramp.exits.layer_dropout import keep_mask, layer_dropout_rates
from offramp.models.base import whole_step
from offramp.models.native.config import DecoderConfig
from offramp.training.checkpoint import Checkpoints
from offramp.training.config import TrainConfig
from offramp.training.exit_loss import ExitLoss
from offramp.training.loop import new_model, train

LAYERS, SOURCE = 5, 2
CONFIG = DecoderConfig(
    vocab_size=13,
    hidden_size=16,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    exit_layers=(1, 2, 4),
    kv_source_layer=SOURCE,
)
TEXT = torch.arange(400) * 7 % 13
WEIGHTS = {"loss_weights": "1=0.2,2=0.3,4=0.3,5=0.5", "batch_size": 4}
DROPOUT = {"layer_dropout": 0.7}
EQUILIBRIUM = {"gradient_equilibrium": True, "loss_weights": "1=0.2,2=0.3,5=0.5"}
STEPS, STEP = 9, 5


def kept_rows(step):
    """Which of 4 rows run each block."""
    rates = layer_dropout_rates(TrainConfig(**DROPOUT), step, STEPS, LAYERS)
    about = {"seed": 0, "step": step, "rows": slice(0, 4), "batch_size": 4}
    return [keep_mask(rates, layer, **about) for layer in range(1, LAYERS + 1)]


KEPT = kept_rows(STEP)


@pytest.fixture(params=["pre", "post"])
def model(request, make_model):
    return make_model(
        num_hidden_layers=LAYERS,
        exit_layers=(1, 2, 4),
        kv_source_layer=SOURCE,
        num_key_value_heads=2,
        norm=request.param,
    )


def step_of(model, text, *, step=1, **fields):
    """The loss and the gradients of one step."""
    model.zero_grad()
    exit_loss = ExitLoss(model, TrainConfig(**{**WEIGHTS, **fields}), total_steps=STEPS)
    loss, _ = exit_loss(text[:, :-1], text[:, 1:], step=step)
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model):
    """By name; zero if no row ran a block."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def same(found, expected, *, within=1e-10):
    assert_close(found[0], expected[0], rtol=within, atol=within)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_close(found[1][name], gradient, rtol=within, atol=within, msg=name)


# Layer dropout, written out.


def rotated(x):
    """(H, T, Dh), each head's halves rotated by its position."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half).double() / half)
    angles = torch.outer(torch.arange(x.shape[1]).double(), frequencies)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def heads(linear, x):
    return (x @ linear.weight.T).view(len(x), -1, 4).transpose(0, 1)


def block_of_a_row(model, layer, h, shared):
    """One row's state (T, D) after a block, and the keys and values that it attends to."""
    block = model.model.layers[layer]
    x = block.attention_input(h)
    if layer <= SOURCE:
        k, v = rotated(heads(block.self_attn.k_proj, x)), heads(block.self_attn.v_proj, x)
        shared = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    k, v = shared
    scores = rotated(heads(block.self_attn.q_proj, x)) @ k.transpose(1, 2) / 2
    scores = scores.masked_fill(~torch.ones(len(h), len(h)).tril().bool(), -math.inf)
    attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return block.after_attention(h, attended), shared


def written_out(model, text, kept):
    """The loss and gradients if row r runs block n only where kept[n - 1][r]."""
    model.zero_grad()
    weights = {1: 0.2, 2: 0.3, 4: 0.3, 5: 0.5}
    total = torch.zeros((), dtype=torch.float64)
    for row, ids in enumerate(text):
        h, shared = model.model.embed_tokens.weight[ids[:-1]], None
        for layer in range(LAYERS):
            after, shared = block_of_a_row(model, layer, h, shared)
            h = after if kept[layer][row] else h
            if weight := weights.get(layer + 1):
                logits = model.lm_head(model.model.norm(h))
                total = total + weight * F.cross_entropy(logits, ids[1:]) / len(text)
    total.backward()
    return total.detach(), gradients(model)


@pytest.mark.parametrize("recompute", [False, True])
def test_rows_that_skip_a_block_still_give_keys_and_values(model, make_ids, recompute):
    text = make_ids(4, 8)
    assert not KEPT[SOURCE].all()  # some rows skip the block whose keys and values all share
    assert torch.stack(KEPT[SOURCE + 1 :]).any(dim=0)[~KEPT[SOURCE]].any()  # and run one above
    found = step_of(model, text, step=STEP, recompute_activations=recompute, **DROPOUT)
    same(found, written_out(model, text, KEPT), within=1e-6)  # rotary tables are float32
    everyone = [torch.ones(4, dtype=torch.bool)] * LAYERS
    same(step_of(model, text), written_out(model, text, everyone), within=1e-6)


def test_a_block_that_all_rows_skip_runs_only_if_others_read_it(model, make_ids, monkeypatch):
    monkeypatch.setattr(
        "offramp.training.exit_loss.keep_mask",
        lambda rates, layer, *, rows, **_: torch.zeros(4, dtype=torch.bool),
    )
    ran = []
    for layer, block in enumerate(model.model.layers, start=1):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    step_of_loss = ExitLoss(model, TrainConfig(**WEIGHTS, **DROPOUT), total_steps=STEPS)
    text = make_ids(4, 8)
    step_of_loss(text[:, :-1], text[:, 1:], step=STEP)
    assert ran == [1, SOURCE + 1]  # the first block is never skipped


# Options that must change nothing.


def test_recomputed_activations_give_the_same_gradients(model, make_ids):
    text = make_ids(4, 8)
    for fields in ({}, DROPOUT, {"detach_exits": True}, EQUILIBRIUM):
        expected = step_of(model, text, step=STEP, **fields)
        assert all(gradient.any() for gradient in expected[1].values())
        same(step_of(model, text, step=STEP, recompute_activations=True, **fields), expected)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_and_gradients():
    """In a process of its own: dynamo does not trace the checks of shapes that tests add."""
    command = [sys.executable, Path(__file__).with_name("compiled.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    gaps = json.loads(done.stdout)
    assert len(gaps) == 6
    assert max(gaps.values()) < 1e-5


def trained(*, config=CONFIG, folder=None, stop_after=None, **fields):
    model, steps = new_model(config, seed=5), []
    done = train(
        model,
        TEXT,
        TEXT[:90],
        TrainConfig(**{**WEIGHTS, "seq_len": 8, "steps": 8, "eval_every": 4, **fields}),
        on_step=lambda progress: steps.append(float(progress.loss)),
        should_stop=lambda: len(steps) == stop_after,
        checkpoints=folder and Checkpoints(folder=folder),
    )
    return model, steps, done


def test_a_batch_in_parts_trains_what_the_whole_batch_trains():
    (whole, losses, _), (parts, others, _) = trained(), trained(accumulate=2)
    assert others == pytest.approx(losses, rel=1e-5)
    for name, value in whole.state_dict().items():
        assert_close(parts.state_dict()[name], value, rtol=0, atol=1e-4, msg=name)


def test_a_stopped_run_resumes_to_the_same_parameters_bit_for_bit(tmp_path):
    whole, losses, _ = trained(**DROPOUT)
    _, first, done = trained(folder=tmp_path, stop_after=3, **DROPOUT)
    assert not done.finished
    resumed, rest, _ = trained(folder=tmp_path, **DROPOUT)
    assert first + rest == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


@pytest.mark.parametrize("fields", [{}, DROPOUT, {"recompute_activations": True}], ids=str)
def test_bfloat16_differs_by_its_rounding(fields):
    exact, rounded = trained(**fields)[1], trained(precision="bfloat16", **fields)[1]
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_every_parameter_learns_and_the_loss_falls():
    model, losses, done = trained(steps=30, lr=1e-2)
    before = new_model(CONFIG, seed=5).state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert losses[-1] < 0.7 * losses[0]
    assert done.best.exit_ppl[LAYERS] < 13


# What does not fit.


def test_gradients_that_pass_by_a_branch_cannot_be_balanced(model):
    fields = {**WEIGHTS, "gradient_equilibrium": True}
    sentence = "^gradient_equilibrium: expected no weights between layer 2, .* got one at layer 4$"
    with pytest.raises(ConfigError, match=sentence):
        ExitLoss(model, TrainConfig(**fields), total_steps=1)


def test_a_call_above_the_source_needs_the_step_of_the_call_below(model, make_ids):
    ids = make_ids(2, 6)
    step = whole_step(ids)
    h = model.run_layers(model.embed(ids, step=step), 0, 4, step=step)
    sentence = "^step: expected that of the call below layer 4, .* values after layer 2, got one"
    with pytest.raises(ConfigError, match=sentence):
        model.run_layers(h, 4, 5, step=whole_step(ids))
    assert isinstance(model, nn.Module)
    assert_close(model.unembed(model.run_layers(h, 4, 5, step=step), 5), model(ids))
    anew = model.run_layers(h, 2, 2, step=whole_step(ids))  # no block above the source runs
    assert torch.equal(anew, h)
