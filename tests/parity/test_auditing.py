"""An audit compares with the last layer and leaves text, cache and later exits as they are."""

import pytest
import torch

from offramp.calibration.audit import Audit
from offramp.errors import ConfigError
from offramp.exits.gate import FittedExits, Gate
from offramp.exits.policy import ThresholdPolicy
from offramp.generation.auditing import Auditor, run_to_the_end
from offramp.generation.confident_exit import ExitDecoder
from offramp.generation.config import EngineConfig, GenerateConfig
from offramp.generation.engine import Engine
from offramp.generation.exit_rule import ExitRule
from offramp.generation.generate import generate
from offramp.models.base import whole_step
from offramp.models.work import Work

EXITS, LAYERS = (1, 2, 4), 5
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "exit_layers": EXITS,
    "intermediate_size": 96,
    "max_position_embeddings": 300,
}
MODELS = {
    "plain": {"exit_head": "norm"},
    "shared keys and values": {"exit_head": "norm", "kv_source_layer": 2},
}


def fitted_gates():
    torch.manual_seed(0)
    found = {"gain": {}}
    for index, layer in enumerate(EXITS):
        gate = Gate(SHAPE["hidden_size"], outputs=len(EXITS) - index, hidden=24)
        torch.nn.init.normal_(gate.out_proj.weight, std=0.5)
        found["gain"][layer] = gate.eval().requires_grad_(False)
    return FittedExits(gates=found)


FITTED = fitted_gates()
RULES = {
    "gain": {"confidence": "gain", "threshold": (-0.6, -0.65, -0.7)},
    "max_prob": {"confidence": "max_prob", "threshold": (0.04, 0.035, 0.03)},
}


def told(made):
    return lambda left, found: made.append((left, found))


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_an_audit_of_every_token_changes_nothing(make_model, make_ids, fields, rule, missing_kv):
    model = make_model(**SHAPE | fields)
    prompt = make_ids(1, 40)[0].tolist()
    config = GenerateConfig(max_new_tokens=60, missing_kv=missing_kv, **RULES[rule])
    seen: list = []
    auditor = Auditor(share=1.0, record=told(seen))
    alone = generate(model, prompt, config, fitted=FITTED)
    audited = generate(model, prompt, config, fitted=FITTED, auditor=auditor)
    for one, other in zip(alone, audited, strict=True):
        assert (one.id, one.exit_layer) == (other.id, other.exit_layer)
        assert one.confidence == other.confidence
    assert alone.work == audited.work
    layers = [token.exit_layer for token in audited.completion.tokens]
    assert 5 < sum(layer < LAYERS for layer in layers) < 60
    assert [left for left, _ in seen] == [layer < LAYERS for layer in layers]
    assert all((found is not None) == left for left, found in seen)
    assert auditor.work.layers_run > 0


@pytest.mark.parametrize("rule", RULES)
def test_under_recompute_it_finds_what_full_depth_computes(make_model, make_ids, rule):
    model = make_model(**SHAPE)
    ids = make_ids(1, 70)[0].tolist()
    of = RULES[rule]
    exit_rule = ExitRule(
        policy=ThresholdPolicy(thresholds=of["threshold"]),
        confidence=of["confidence"],
        fitted=FITTED,
    )
    cache = model.make_cache(1, 100)
    decoder = ExitDecoder(model, cache, batch_size=1, rule=exit_rule, missing_kv="recompute")
    decoder.prefill([ids[:20]])
    whole = torch.tensor([ids])
    step = whole_step(whole)
    with torch.no_grad():
        h = model.run_layers(model.embed(whole, step=step), 0, LAYERS, step=step)
        expected = model.unembed(h, LAYERS)[0]
    audits = 0
    for place, token in enumerate(ids[20:], start=20):
        exits = decoder.decode_one_token([token], [0])
        if exits.exit_layers[0] < LAYERS:
            found = run_to_the_end(decoder, 0, exits.exit_layers[0], Work())
            torch.testing.assert_close(found, expected[place], rtol=1e-4, atol=1e-4)
            audits += 1
    assert audits > 5


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
def test_it_finds_what_the_token_would_have_had_without_its_exit(make_model, make_ids, missing_kv):
    """The same tokens before it left where they left; it alone runs on to the end."""
    model = make_model(**SHAPE)
    ids = make_ids(1, 60)[0].tolist()
    policy = ThresholdPolicy(thresholds=RULES["max_prob"]["threshold"])
    rule = ExitRule(policy=policy, confidence="max_prob")

    def decoded(last: int) -> ExitDecoder:
        cache = model.make_cache(1, 100)
        decoder = ExitDecoder(model, cache, batch_size=1, rule=rule, missing_kv=missing_kv)
        decoder.prefill([ids[:20]])
        for token in ids[20:last]:
            decoder.decode_one_token([token], [0])
        return decoder

    compared = 0
    for last in (25, 33, 48, 59):
        decoder = decoded(last)
        exits = decoder.decode_one_token([ids[last]], [0])
        if exits.exit_layers[0] == LAYERS:
            continue
        found = run_to_the_end(decoder, 0, exits.exit_layers[0], Work())
        other = decoded(last)
        never = ThresholdPolicy.of(float("inf"), len(model.exit_layers))
        other._rules[0] = ExitRule(policy=never, confidence="max_prob")
        expected = other.decode_one_token([ids[last]], [0])
        assert expected.exit_layers == [LAYERS]
        torch.testing.assert_close(found, expected.logits[0], rtol=1e-5, atol=1e-5)
        compared += 1
    assert compared


def test_rows_of_an_engine_are_audited_and_get_the_texts_that_they_get_alone(make_model, make_ids):
    model = make_model(**SHAPE)
    prompts = [make_ids(1, n)[0].tolist() for n in (9, 30, 17, 4)]
    configs = [
        GenerateConfig(max_new_tokens=20 + n, missing_kv=way, **RULES[rule])
        for n, (way, rule) in enumerate(
            [("propagate", "gain"), ("recompute", "max_prob"), ("propagate", "gain")]
        )
    ]
    configs.append(GenerateConfig(max_new_tokens=9, speculative=True, draft_exit=1))
    seen: list = []
    engine = Engine(
        model,
        EngineConfig(slots=2, capacity=100),
        fitted=FITTED,
        auditor=Auditor(share=1.0, record=told(seen)),
    )
    requests = [engine.submit(p, c) for p, c in zip(prompts, configs, strict=True)]
    list(engine.run())
    for prompt, config, request in zip(prompts, configs, requests, strict=True):
        alone = generate(model, prompt, config, fitted=FITTED)
        assert [t.id for t in alone] == request.completion.ids
    assert len(seen) == sum(len(request.completion.tokens) for request in requests)


def test_the_share_is_that_of_the_coins_and_feeds_the_bound(make_model, make_ids):
    model = make_model(**SHAPE)
    audit = Audit(share=0.25)

    def record(left, found):
        if not left:
            audit.ran_whole()
        elif found is None:
            audit.left()
        else:
            audit.audited_loss(float(found.disagrees))

    config = GenerateConfig(max_new_tokens=200, **RULES["gain"])
    auditor = Auditor(share=0.25, record=record, seed=3)
    list(generate(model, make_ids(1, 9)[0].tolist(), config, fitted=FITTED, auditor=auditor))
    assert audit.tokens == 200
    assert 0.15 * audit.tokens_left < audit.audited < 0.35 * audit.tokens_left
    assert 0 < audit.lower_left <= audit.estimate <= audit.upper_left <= 1


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="audit: expected a share above 0 and at most 1"):
        Auditor(share=share, record=print)
