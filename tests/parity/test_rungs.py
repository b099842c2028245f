"""Tokens leave by the rung that is chosen for each, routed in one call or step by step."""

import pytest
import torch

from offramp.exits.gate import FittedExits, Gate
from offramp.generation.auditing import Auditor
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.engine import Engine
from offramp.generation.generate import generate
from offramp.generation.ladder import RUNGS
from offramp.models.native.fast import kernels

EXITS, LAYERS = (1, 2, 4), 5
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "exit_layers": EXITS,
    "intermediate_size": 96,
    "max_position_embeddings": 300,
    "exit_head": "norm",
}


def fitted_gates():
    torch.manual_seed(0)
    found = {"gate": {}, "gain": {}}
    for index, layer in enumerate(EXITS):
        for kind, outputs in (("gate", 1), ("gain", len(EXITS) - index)):
            gate = Gate(SHAPE["hidden_size"], outputs=outputs, hidden=24)
            torch.nn.init.normal_(gate.out_proj.weight, std=0.5)
            found[kind][layer] = gate.eval().requires_grad_(False)
    return FittedExits(gates=found)


FITTED = fitted_gates()
RULES = {
    "gain": {"confidence": "gain", "threshold": (-5.0, -6.0, -7.0)},
    "falling gate": {"confidence": "gate", "threshold": (0.3, 0.25, 0.2), "decay": 4.0},
    "max_prob": {"confidence": "max_prob", "threshold": (0.04, 0.035, 0.03)},
    "patience": {"confidence": "patience", "threshold": (3.0, 1.5, 1.0)},
    "saturation": {"confidence": "saturation", "threshold": -1.0},
}


def auditor(rungs, seen):
    """An auditor that audits every token and chooses these rungs, one after another."""
    chosen = iter(rungs)
    return Auditor(
        share=1.0,
        record=lambda left, found: seen.append(left),
        rung=lambda pending: next(chosen),
    )


def written(model, prompts, configs, rungs, *, slots):
    seen: list = []
    engine = Engine(
        model,
        EngineConfig(slots=slots, capacity=len(max(prompts, key=len)) + 61),
        fitted=FITTED,
        auditor=auditor(rungs, seen),
    )
    requests = [engine.submit(p, c) for p, c in zip(prompts, configs, strict=True)]
    list(engine.run())
    tokens = [[(t.id, t.exit_layer) for t in request.completion.tokens] for request in requests]
    assert len(seen) == sum(map(len, tokens))
    return tokens, engine


def alone(model, prompt, config):
    return [(t.id, t.exit_layer) for t in generate(model, prompt, config, fitted=FITTED)]


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
@pytest.mark.parametrize("rule", RULES)
def test_the_last_rung_is_the_texts_own_rule_and_the_first_full_depth(
    make_model, make_ids, rule, missing_kv
):
    model = make_model(dtype=torch.float32, **SHAPE)
    prompt = make_ids(1, 20)[0].tolist()
    config = GenerateConfig(max_new_tokens=40, missing_kv=missing_kv, **RULES[rule])
    own = alone(model, prompt, config)
    assert {layer for _, layer in own} > {LAYERS}
    [found], _ = written(model, [prompt], [config], [RUNGS] * 40, slots=1)
    assert found == own
    [found], _ = written(model, [prompt], [config], [0] * 40, slots=1)
    assert found == alone(model, prompt, GenerateConfig(max_new_tokens=40))


@pytest.mark.parametrize(
    ("rule", "missing_kv"), list(zip(RULES, ["recompute", "propagate"] * 3, strict=False))
)
def test_rungs_that_change_at_every_token_give_the_same_text_by_every_path(
    make_model, make_ids, rule, missing_kv
):
    """A token on rung 0 reads what those that left before it have pending."""
    model = make_model(dtype=torch.float32, **SHAPE)
    prompts = make_ids(3, 20).tolist()
    config = GenerateConfig(max_new_tokens=30, missing_kv=missing_kv, **RULES[rule])
    rungs = [rung for place in range(30) for rung in [(0, 0, 6, 5, 6, 3, 0)[place % 7]] * 3]
    one, engine = written(model, prompts, [config] * 3, rungs, slots=3)
    if rule in ("gain", "falling gate") and kernels._compiled is not None:
        assert engine._decoder._routed._router is not None
    for prompt, text in zip(prompts, one, strict=True):
        [single], _ = written(model, [prompt], [config], rungs[::3], slots=1)
        assert single == text
    model.router = lambda cache, spec: None
    other, _ = written(model, prompts, [config] * 3, rungs, slots=3)
    assert one == other
    assert any(layer < LAYERS for text in one for _, layer in text)


def test_a_row_of_full_depth_beside_rows_with_rungs(make_model, make_ids):
    model = make_model(dtype=torch.float32, **SHAPE)
    prompts = make_ids(3, 20).tolist()
    plain = GenerateConfig(max_new_tokens=30)
    configs = [GenerateConfig(max_new_tokens=30, **RULES[rule]) for rule in ("gain", "max_prob")]
    found, _ = written(model, prompts, [*configs, plain], [RUNGS] * 90, slots=3)
    expected = zip(prompts, [*configs, plain], strict=True)
    assert found == [alone(model, prompt, config) for prompt, config in expected]


def test_pending_tokens_are_those_of_other_rows_that_may_leave(make_model, make_ids):
    given, asked = iter((3, RUNGS, 5, 0)), []

    def rung(pending):
        asked.append(pending)
        return next(given)

    model = make_model(dtype=torch.float32, **SHAPE)
    engine = Engine(
        model,
        EngineConfig(slots=4, capacity=40),
        fitted=FITTED,
        auditor=Auditor(share=1.0, record=lambda left, found: None, rung=rung),
    )
    own = GenerateConfig(max_new_tokens=2, **RULES["gain"])
    plain = GenerateConfig(max_new_tokens=2)
    for prompt, config in zip(make_ids(4, 5).tolist(), (own, plain, own, own), strict=True):
        engine.submit(prompt, config)
    list(engine.run())
    assert asked == [0, 1, 1, 2]  # the second row has no exits, and so leaves nowhere


def test_a_cache_of_few_positions_has_all_rungs(make_model, make_ids):
    model = make_model(dtype=torch.float32, **SHAPE)
    prompt = make_ids(1, 1)[0].tolist()
    config = GenerateConfig(max_new_tokens=2, **RULES["gain"])
    engine = Engine(
        model,
        EngineConfig(slots=1, capacity=2),
        fitted=FITTED,
        auditor=auditor([RUNGS], []),
    )
    request = engine.submit(prompt, config)
    list(engine.run())
    found = [(t.id, t.exit_layer) for t in request.completion.tokens]
    assert found == alone(model, prompt, config)


def test_tokens_that_wait_for_others_have_rungs_and_are_pending(make_model, make_ids):
    model = make_model(dtype=torch.float32, **SHAPE)
    prompts = make_ids(3, 10).tolist()
    config = GenerateConfig(max_new_tokens=15, **RULES["max_prob"])
    texts, most = [], []
    for wait in (0, 3):
        asked: list = []

        def rung(pending, asked=asked):
            asked.append(pending)
            return RUNGS - 1

        engine = Engine(
            model,
            EngineConfig(slots=3, capacity=30, max_wait=wait),
            auditor=Auditor(share=1.0, record=lambda left, found: None, rung=rung),
        )
        requests = [engine.submit(prompt, config) for prompt in prompts]
        list(engine.run())
        texts.append([[(t.id, t.exit_layer) for t in r.completion.tokens] for r in requests])
        most.append(max(asked))
        assert len(asked) == 3 * 14
    assert texts[0] == texts[1]
    assert most == [2, 2]
