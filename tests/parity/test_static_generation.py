"""Decoding with the static steps of a GPU gives what it gives with blocks and kernels of a CPU."""

import pytest
import torch
from torch.testing import assert_close

from offramp.exits.gate import FittedExits, Gate
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.generation.confident_exit import ExitRule
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.engine import Engine
from offramp.generation.forced import forced_exits
from offramp.generation.generate import generate, generate_batch

PROMPTS = ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7])
MODELS = {
    "pre-norm": {"num_key_value_heads": 2},
    "post-norm": {"norm": "post"},
    "complete exits": {"kv_source_layer": 1, "num_key_value_heads": 2},
    "one complete exit": {"kv_source_layer": 3},
}
RULES = {"sure": (0.45, 0.35, 0.25), "never": (2.0, 2.0, 2.0)}


@pytest.fixture(params=MODELS)
def model(request, make_model):
    model = make_model(
        num_hidden_layers=5, exit_layers=(1, 2, 4), exit_head="norm", **MODELS[request.param]
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # spread the confidences
    return model


def both(model, graphs, decode):
    """What ``decode`` gives without and with static steps, the latter replayed."""
    found = []
    for use_static in (None, True):
        model.few_tokens.use_static = model.few_tokens.static.capture = use_static
        found.append(decode())
    assert graphs.replayed > 0
    model.few_tokens.use_static = None
    return found


def texts(completions):
    return [[(token.id, token.exit_layer) for token in each.tokens] for each in completions]


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
@pytest.mark.parametrize("rule", RULES)
def test_forced_texts_leave_alike_in_a_batch(model, make_ids, graphs, missing_kv, rule):
    policy = ThresholdPolicy(thresholds=RULES[rule])
    ids = make_ids(3, 14, seed=2)
    (logits, exits), (static_logits, static_exits) = both(
        model,
        graphs,
        lambda: forced_exits(model, ids, ExitRule(policy=policy), missing_kv=missing_kv),
    )
    assert torch.equal(exits, static_exits)
    assert_close(logits, static_logits)
    if rule == "sure":
        assert len(exits.unique()) > 2  # rows leave at different times


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
def test_rows_that_join_and_leave_get_their_own_texts(model, graphs, missing_kv):
    config = GenerateConfig(threshold=0.28, missing_kv=missing_kv)

    def decode():
        engine = Engine(model, EngineConfig(slots=2, capacity=40))
        requests = []
        for n, new in enumerate((5, 14, 9, 7, 12)):
            prompt = PROMPTS[n % 3]
            requests.append(
                engine.submit(prompt, GenerateConfig(**{**vars(config), "max_new_tokens": new}))
            )
            engine.step()
            engine.step()
        for _ in engine.run():
            pass
        return texts([request.completion for request in requests])

    eager, static = both(model, graphs, decode)
    assert eager == static


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_speculation_gives_the_text_without_drafts(model, graphs, temperature):
    prompt, options = PROMPTS[0], {"max_new_tokens": 16, "temperature": temperature}
    drafts = {"speculative": True, "draft_threshold": 0.1, "adaptive": False}
    plain, static = both(model, graphs, lambda: texts([_done(model, prompt, **options)]))
    assert plain == static
    eager, static = both(model, graphs, lambda: texts([_done(model, prompt, **options, **drafts)]))
    assert [token for token, _ in static[0]] == [token for token, _ in plain[0]]
    assert eager == static


def test_rows_with_drafts_share_a_cache_with_rows_that_leave(model, graphs):
    options = {"max_new_tokens": 10}
    configs = (
        GenerateConfig(**options, speculative=True, draft_threshold=0.1, adaptive=False),
        GenerateConfig(**options, threshold=0.28),
        GenerateConfig(**options, threshold=0.28, missing_kv="recompute"),
    )

    def decode():
        engine = Engine(model, EngineConfig(slots=3, capacity=24))
        requests = [engine.submit(*each) for each in zip(PROMPTS, configs, strict=True)]
        for _ in engine.run():
            pass
        return texts([request.completion for request in requests])

    eager, static = both(model, graphs, decode)
    assert eager == static


def test_a_batch_by_gain_leaves_alike(model, graphs):
    random = torch.Generator().manual_seed(5)
    gates = {}
    for n, layer in enumerate(model.exit_layers[:-1]):
        gates[layer] = Gate(model.hidden_size, outputs=3 - n).eval()
        torch.nn.init.normal_(gates[layer].out_proj.weight, generator=random, std=2.0)
    fitted = FittedExits(gates={"gain": gates})
    policy = GainPolicy(price=0.01, costs=(10.0, 30.0, 60.0, 100.0))
    config = GenerateConfig(max_new_tokens=12, confidence="gain")
    eager, static = both(
        model,
        graphs,
        lambda: texts(generate_batch(model, PROMPTS, config, fitted=fitted, policy=policy)[0]),
    )
    assert eager == static
    assert len({layer for row in eager for _, layer in row}) > 1


def test_the_static_steps_fill_beside_and_round_as_they_may(model):
    model.few_tokens.use_static = True
    assert model.fills_beside(16)
    assert not model.fills_beside(17)
    assert not model.rounds_alike()


def _done(model, prompt, **options):
    generation = generate(model, prompt, GenerateConfig(**options))
    for _ in generation:
        pass
    return generation.completion
