"""However tokens are decoded, they are those of the model run over the whole text."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from offramp.data import batches
from offramp.evaluation.sweep import sweep
from offramp.evaluation.trace import collect_trace
from offramp.exits.confidence import ExitView, confidence_named
from offramp.exits.gate import FittedExits
from offramp.exits.policy import ThresholdPolicy
from offramp.generation import deferred
from offramp.generation.confident_exit import ExitRule
from offramp.generation.config import GenerateConfig
from offramp.generation.forced import forced_exits
from offramp.generation.generate import generate, generate_batch
from offramp.models.base import whole_step
from offramp.models.propagate import run_propagated

NEW = 12
PROMPTS = ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7])


@pytest.fixture(params=["pre", "post"])
def model(request, make_model):
    model = make_model(
        norm=request.param,
        num_hidden_layers=5,
        exit_layers=(1, 2, 4),
        num_key_value_heads=2,
        exit_head="norm",
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # spread the confidences
    return model


@torch.inference_mode()
def greedy(model, prompt, new=NEW):
    """New tokens, by running the whole text for each."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def new_ids(model, prompt=PROMPTS[0], **options):
    generation = generate(model, prompt, GenerateConfig(max_new_tokens=NEW, **options))
    return [token.id for token in generation]


def test_greedy_decoding_equals_running_the_whole_text(model):
    for prompt in PROMPTS:
        assert new_ids(model, prompt) == greedy(model, prompt)


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
@pytest.mark.parametrize("confidence", ["max_prob", "margin", "entropy", "saturation"])
def test_a_threshold_above_one_is_full_decoding(model, missing_kv, confidence):
    options = {"missing_kv": missing_kv, "confidence": confidence}
    assert new_ids(model, threshold=1.01, **options) == greedy(model, PROMPTS[0])


def test_with_recompute_a_token_says_what_its_exit_says(model):
    """Each new token is the argmax of its own exit over the whole text before it."""
    config = GenerateConfig(max_new_tokens=NEW, threshold=0.4, missing_kv="recompute")
    tokens = list(generate(model, PROMPTS[0], config))
    ids = [*PROMPTS[0], *(token.id for token in tokens)]
    every = model.forward_all_layers(torch.tensor([ids]))
    for place, token in enumerate(tokens, start=len(PROMPTS[0])):
        logits = every[token.exit_layer - 1][0, place - 1]
        assert token.id == logits.argmax()
        assert token.confidence == pytest.approx(logits.softmax(-1).amax().item())
    assert len({token.exit_layer for token in tokens[1:]}) > 1


# The real router forced along a text, against an evaluation of the same text.

EXITS = [(2,), (1, 2, 4)]
LENGTH = 40


def routed(make_model, exits, seed=0):
    model = make_model(
        seed=seed, num_hidden_layers=5, exit_layers=exits, dtype=torch.float32, exit_head="full"
    )
    with torch.no_grad():
        for head in model.exits.values():
            head.lm_head.weight.mul_(2)
    return model


def at_exits(every, layers):
    """(B, T, V): each token's logits at its own layer."""
    stacked = torch.stack(every)
    return stacked.gather(0, (layers - 1)[None, ..., None].expand(1, *stacked.shape[1:]))[0]


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize(
    ("confidence", "threshold"),
    [("max_prob", 0.25), ("margin", 0.1), ("entropy", 0.2), ("saturation", 0.5), ("patience", 2.0)],
)
def test_a_sweep_equals_the_real_router_forced_along_the_text(
    make_model, make_ids, exits, confidence, threshold
):
    model = routed(make_model, exits)
    text = make_ids(3, LENGTH + 1)
    inputs, targets = text[:, :-1], text[:, 1:]
    trace = collect_trace(model, [(inputs, targets)], measures=(confidence,))
    [row] = sweep(trace, [threshold], confidence=confidence)
    rule = ExitRule(policy=ThresholdPolicy.of(threshold, len(exits) + 1), confidence=confidence)
    logits, layers = forced_exits(model, inputs, rule, missing_kv="recompute")
    assert_close(logits, at_exits(model.forward_all_layers(inputs), layers), rtol=1e-4, atol=1e-4)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert math.exp(nll) == pytest.approx(row.ppl, rel=1e-5)
    shares = {layer: (layers == layer).double().mean().item() for layer in model.exit_layers}
    assert shares == pytest.approx(row.exit_share)
    if confidence != "patience" or len(exits) > 1:  # one exit alone never has patience 2
        assert sum(share > 0 for share in shares.values()) > 1


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize(("confidence", "threshold"), [("max_prob", 0.35), ("saturation", 0.5)])
@pytest.mark.parametrize("beside", [False, True], ids=["before", "beside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_propagated_states_equal_the_real_router_forced_along_the_text(
    make_model, make_ids, exits, confidence, threshold, beside, dtype, monkeypatch
):
    """Pending keys and values may be projected before the token that needs them, or beside it."""
    model = routed(make_model, exits).to(dtype)
    monkeypatch.setattr(type(model), "fills_beside", lambda _, tokens: beside and tokens < 17)
    inputs = make_ids(3, LENGTH)
    policy = ThresholdPolicy.of(threshold, len(exits) + 1)
    measure = confidence_named(confidence)

    def leaves(layer, h, previous):
        view = ExitView(
            exit_layer=layer, logits=model.unembed(h, layer), state=h, previous_state=previous
        )
        return policy.leaves(exits.index(layer), measure.score(view))

    with torch.inference_mode():
        h, layers = run_propagated(
            model,
            inputs,
            leaves,
            step=whole_step(inputs),
            needs_previous_state=measure.needs_previous_state,
        )
        expected = at_exits([model.unembed(h, layer) for layer in range(1, 6)], layers)
    rule = ExitRule(policy=policy, confidence=confidence)
    logits, forced = forced_exits(model, inputs, rule, missing_kv="propagate")
    assert torch.equal(forced, layers)
    near = 1e-4 if dtype == torch.float32 else 1e-7
    assert_close(logits, expected, rtol=near, atol=near)
    assert len(layers.unique()) > 1
    exact, _ = forced_exits(model, inputs, rule, missing_kv="recompute")
    assert not torch.allclose(exact, logits)  # the two meanings differ


def test_a_trace_in_windows_equals_the_router_started_anew_in_each(make_model, make_ids):
    model = routed(make_model, (1, 2, 4))
    ids = make_ids(1, 100)[0]
    trace = collect_trace(model, batches(ids, seq_len=16, batch_size=3))
    [row] = sweep(trace, [(0.2, 0.3, 0.25)])
    rule = ExitRule(policy=ThresholdPolicy(thresholds=(0.2, 0.3, 0.25)))
    total = 0.0
    for inputs, targets in batches(ids, seq_len=16, batch_size=3):
        logits, _ = forced_exits(model, inputs, rule, missing_kv="recompute")
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    assert math.exp(total / trace.num_tokens) == pytest.approx(row.ppl, rel=1e-5)


# Batches.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.4, "missing_kv": "propagate"},
        {"threshold": 0.4, "missing_kv": "recompute"},
        {"threshold": 2.0, "confidence": "patience", "missing_kv": "recompute"},
        {"threshold": 0.8, "confidence": "saturation", "missing_kv": "propagate"},
        {"temperature": 1.0, "top_k": 8, "repetition_penalty": 1.3, "seed": 5},
        {"temperature": 0.9, "top_p": 0.8, "threshold": 0.4},
    ],
)
def test_a_row_of_a_batch_is_what_it_is_alone(model, options):
    alone, stops = [], set()
    for stop in (0, 7):  # rows that stop at different times
        config = GenerateConfig(max_new_tokens=NEW, stop_tokens=(stop,), **options)
        for row, prompt in enumerate(PROMPTS):
            seeded = GenerateConfig(
                max_new_tokens=NEW,
                stop_tokens=(stop,),
                **{**options, "seed": options.get("seed", 0) + row},
            )
            generation = generate(model, prompt, seeded)
            alone.append(list(generation))
            stops.add(len(alone[-1]))
        completions, _ = generate_batch(model, PROMPTS, config)
        for completion, tokens in zip(completions, alone[-3:], strict=True):
            assert completion.ids == [token.id for token in tokens]
            for got, token in zip(completion.tokens, tokens, strict=True):
                assert got.exit_layer == token.exit_layer
                assert got.confidence == pytest.approx(token.confidence)


def test_pending_tokens_may_run_in_portions(model, monkeypatch):
    config = GenerateConfig(max_new_tokens=NEW, threshold=0.4, missing_kv="recompute")
    whole, before = generate_batch(model, PROMPTS, config)
    assert max(before.blocks) > len(PROMPTS)
    monkeypatch.setattr(deferred, "FEW_TOKENS", 2)
    portions, work = generate_batch(model, PROMPTS, config)
    assert [each.ids for each in portions] == [each.ids for each in whole]
    assert max(work.blocks) <= len(PROMPTS)


def test_rows_of_a_batch_stop_and_leave_at_different_times(model):
    """Or the test above would show little."""
    config = GenerateConfig(max_new_tokens=NEW, threshold=0.4, stop_tokens=(0,))
    completions, _ = generate_batch(model, PROMPTS, config)
    assert len({len(completion.tokens) for completion in completions}) > 1
    config = GenerateConfig(max_new_tokens=NEW, threshold=0.4)
    completions, _ = generate_batch(model, PROMPTS, config)
    layers = [[token.exit_layer for token in completion.tokens] for completion in completions]
    assert any(len(set(step)) > 1 for step in zip(*layers, strict=False))


# Self-speculation.


@pytest.mark.parametrize("draft_exit", [1, 2, 4])
@pytest.mark.parametrize("draft_threshold", [-math.inf, 0.3, math.inf])
@pytest.mark.parametrize("max_drafts", [1, 3, 6])
@pytest.mark.parametrize("lookup", [0, 1])
def test_speculation_is_greedy_decoding(model, draft_exit, draft_threshold, max_drafts, lookup):
    generation = generate(
        model,
        PROMPTS[0],
        GenerateConfig(
            max_new_tokens=30,
            speculative=True,
            adaptive=False,
            draft_exit=draft_exit,
            draft_threshold=draft_threshold,
            max_drafts=max_drafts,
            lookup=lookup,
        ),
    )
    assert [token.id for token in generation] == greedy(model, PROMPTS[0], 30)
    if not lookup:
        assert (generation.acceptance_rate is None) == (draft_threshold == math.inf)


@pytest.mark.parametrize("vocab", [[5, 1, 9, 0, 11], list(range(13)), [12]])
@pytest.mark.parametrize("adaptive", [True, False])
def test_drafts_of_a_part_of_the_vocabulary_change_nothing(model, vocab, adaptive):
    for options in ({}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.5}):
        speculative = generate(
            model,
            PROMPTS[2],
            GenerateConfig(
                max_new_tokens=40,
                speculative=True,
                adaptive=adaptive,
                draft_threshold=-1.0,
                **options,
            ),
            fitted=FittedExits(draft_vocab=torch.tensor(vocab)),
        )
        plain = generate(model, PROMPTS[2], GenerateConfig(max_new_tokens=40, **options))
        assert [token.id for token in speculative] == [token.id for token in plain]


def test_speculation_at_a_good_exit_accepts_and_runs_no_layer_twice(make_model):
    """An exit with nothing but the identity above it: every draft is right."""
    model = make_model(num_hidden_layers=4, exit_layers=(2,))
    with torch.no_grad():
        for block in model.model.layers[2:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    ran = []
    run_layers = model.run_layers

    def counted(h, start, stop, **arguments):
        ran.append((start, stop, h.shape[1]))
        return run_layers(h, start, stop, **arguments)

    model.run_layers = counted
    config = GenerateConfig(
        max_new_tokens=13,
        speculative=True,
        adaptive=False,
        draft_threshold=0.0,
        max_drafts=3,
        lookup=0,
    )
    generation = generate(model, PROMPTS[0], config)
    tokens = [token.id for token in generation]
    model.run_layers = run_layers
    assert tokens == greedy(model, PROMPTS[0], 13)
    assert generation.acceptance_rate == 1.0
    assert ran == [(0, 4, 5)] + 3 * ([(0, 2, 1)] * 4 + [(2, 4, 4)])
    assert [token.exit_layer for token in generation.completion.tokens[1:5]] == [2, 2, 2, 4]
    assert generation.mean_layers == 4.0
