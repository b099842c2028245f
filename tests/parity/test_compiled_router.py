"""Tokens routed in one call leave where they leave step by step, with equal logits."""

import pytest
import torch

from offramp.exits.gate import FittedExits, Gate
from offramp.exits.policy import Decay, GainPolicy, ThresholdPolicy
from offramp.generation.auditing import run_to_the_end
from offramp.generation.confident_exit import ExitDecoder, ExitRule
from offramp.generation.config import GenerateConfig
from offramp.generation.forced import forced_exits
from offramp.generation.generate import generate, generate_batch
from offramp.models.native.fast import kernels
from offramp.models.work import Work

pytestmark = pytest.mark.skipif(kernels._compiled is None, reason="the kernels were not built")

EXITS, LAYERS = (1, 2, 4), 5
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "exit_layers": EXITS,
    "intermediate_size": 96,
    "max_position_embeddings": 300,
}
MODELS = [
    {"exit_head": "norm"},
    {"exit_head": "norm", "num_key_value_heads": 2, "kv_source_layer": 2},
    {"exit_head": "shared", "kv_source_layer": 4},
    {"exit_head": "adapter", "tie_word_embeddings": True},
    {"exit_head": "full", "norm": "post"},
]


def gates(seed=0):
    """Random gates whose scores differ between tokens."""
    torch.manual_seed(seed)
    found = {"gate": {}, "gain": {}}
    for index, layer in enumerate(EXITS):
        for kind, outputs in (("gate", 1), ("gain", len(EXITS) - index)):
            gate = Gate(SHAPE["hidden_size"], outputs=outputs, hidden=24)
            torch.nn.init.normal_(gate.out_proj.weight, std=0.5)
            torch.nn.init.uniform_(gate.norm.weight, 0.5, 1.5)
            found[kind][layer] = gate.eval().requires_grad_(False)
    return FittedExits(gates=found)


def rules(fitted):
    """Rules under which tokens leave at every exit."""
    gain = {"confidence": "gain", "fitted": fitted}
    few = ThresholdPolicy(thresholds=(-0.6, -0.6, -0.7))
    many = ThresholdPolicy(thresholds=(-0.7, -0.8, -0.8))
    falling = ThresholdPolicy(thresholds=(0.6, 0.55, 0.5), decay=Decay(tau=4.0, length=60))
    return {
        "full depth": None,
        "few": ExitRule(policy=few, **gain),
        "many": ExitRule(policy=many, **gain),
        "never": ExitRule(policy=ThresholdPolicy.of(float("inf"), 4), **gain),
        "always": ExitRule(policy=ThresholdPolicy.of(-float("inf"), 4), **gain),
        "price": ExitRule(policy=GainPolicy(price=0.01, costs=(20.0, 40.0, 80.0, 100.0)), **gain),
        "gate": ExitRule(policy=falling, confidence="gate", fitted=fitted),
    }


def step_by_step(model):
    """Let the model run as if it had no kernels that route."""
    model.router = lambda cache, spec: None


CASES = [
    (fields, missing_kv, dtype)
    for number, fields in enumerate(MODELS)
    for missing_kv in ("propagate", "recompute")
    for dtype in (torch.float32, torch.bfloat16)
    if dtype == torch.float32 or (missing_kv == "recompute") == (number % 2 == 0)
]


def name_of(value):
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("fields", "missing_kv", "dtype"), CASES, ids=name_of)
def test_a_routed_token_is_that_of_single_steps(make_model, make_ids, fields, missing_kv, dtype):
    model = make_model(dtype=dtype, **SHAPE, **fields)
    with torch.inference_mode():
        model.model.embed_tokens.weight.mul_(30)
    ids, left = make_ids(3, 33), set()
    for name, rule in rules(gates()).items():
        for rows in (ids[:1], ids) if name in ("many", "price") else (ids,):
            outcomes = []
            for compiled in (True, False):
                if not compiled:
                    step_by_step(model)
                decoder = ExitDecoder(
                    model,
                    model.make_cache(*rows.shape),
                    batch_size=len(rows),
                    rule=rule,
                    missing_kv=missing_kv,
                )
                steps = [
                    decoder.decode_one_token(each, range(len(rows))) for each in rows.T.tolist()
                ]
                assert (decoder._routed._router is not None) == compiled
                outcomes.append((steps, decoder))
                vars(model).pop("router", None)
            (routed, one), (single, other) = outcomes
            for ours, theirs in zip(routed, single, strict=True):
                assert ours.exit_layers == theirs.exit_layers, name
                assert torch.equal(ours.logits, theirs.logits), name
                assert ours.confidence == pytest.approx(theirs.confidence, rel=1e-4, abs=1e-6)
                left |= set(ours.exit_layers)
                if ours.likeliest is not None:
                    top, place = theirs.logits.max(dim=-1)
                    assert ours.likeliest == list(zip(top.tolist(), place.tolist(), strict=True))
            assert one.work == other.work, name
    assert left == {*EXITS, LAYERS}  # the rules are strict and lenient enough


@pytest.mark.parametrize(("fields", "missing_kv", "dtype"), CASES, ids=name_of)
def test_an_audit_of_a_routed_token_is_that_of_single_steps(
    make_model, make_ids, fields, missing_kv, dtype
):
    model = make_model(dtype=dtype, **SHAPE, **fields)
    with torch.inference_mode():
        model.model.embed_tokens.weight.mul_(30)
    ids, left, of = make_ids(3, 33), set(), rules(gates())
    for rule in (of["few"], of["price"], of["gate"]):
        outcomes = []
        for compiled in (True, False):
            if not compiled:
                step_by_step(model)
            cache = model.make_cache(3, 33)
            decoder = ExitDecoder(model, cache, batch_size=3, rule=rule, missing_kv=missing_kv)
            work, audits, steps = Work(), [], []
            for each in ids.T.tolist():
                exits = decoder.decode_one_token(each, range(3))
                lengths = cache.lengths.clone()
                for row, layer in zip(exits.rows, exits.exit_layers, strict=True):
                    if layer < LAYERS:
                        audits.append(run_to_the_end(decoder, row, layer, work))
                        left.add(layer)
                assert torch.equal(lengths, cache.lengths)
                steps.append(exits)
            vars(model).pop("router", None)
            outcomes.append((audits, work, steps))
        (ours, work, steps), (theirs, other_work, other_steps) = outcomes
        assert len(ours) > 5
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        assert work == other_work
        for one, other in zip(steps, other_steps, strict=True):
            assert one.exit_layers == other.exit_layers
            assert torch.equal(one.logits, other.logits)
    assert left == set(EXITS)


def test_only_a_token_of_the_last_step_that_left_early_runs_on(make_model):
    model = make_model(dtype=torch.float32, **SHAPE)
    decoder = ExitDecoder(model, model.make_cache(1, 8), batch_size=1, rule=rules(gates())["never"])
    decoder.decode_one_token([1], [0])
    with pytest.raises(ValueError, match="expected a token of the last call that left early"):
        decoder.run_on(0, Work())


@pytest.mark.parametrize("missing_kv", ["propagate", "recompute"])
def test_generated_texts_are_equal(make_model, missing_kv):
    model = make_model(dtype=torch.float32, exit_head="norm", **SHAPE)
    config = GenerateConfig(
        max_new_tokens=40, threshold=-0.7, confidence="gain", missing_kv=missing_kv
    )
    prompts = [[1, 2, 3, 4], [5], [6, 7, 8]]
    found = []
    for compiled in (True, False):
        if not compiled:
            step_by_step(model)
        alone = [list(generate(model, prompt, config, fitted=gates())) for prompt in prompts]
        batch, _ = generate_batch(model, prompts, config, fitted=gates())
        tokens = [(token.id, token.exit_layer) for row in alone for token in row]
        assert tokens == [(t.id, t.exit_layer) for row in batch for t in row.tokens]
        found.append(tokens)
    assert found[0] == found[1]
    assert len({layer for _, layer in found[0]}) > 2


def test_many_pending_tokens_and_rows_that_end(make_model, make_ids):
    model = make_model(dtype=torch.float32, exit_head="norm", **SHAPE)
    ids, fitted = make_ids(2, 150), gates()
    bounds = (-torch.inf, torch.inf, torch.inf)  # all leave at the first exit, but the last token
    rule = ExitRule(policy=ThresholdPolicy(thresholds=bounds), confidence="gain", fitted=fitted)
    decoder = ExitDecoder(model, model.make_cache(2, 150), batch_size=2, rule=rule)
    for each in ids.T.tolist()[:-1]:
        decoder.decode_one_token(each, range(2))
    router = decoder._routed._router
    assert router._plan.pending == 2 * 149
    router.drop(1)
    assert router._plan.pending == 149
    assert set(router._pending["rows"][:149].tolist()) == {0}
    assert router._pending["slots"][:149].tolist() == list(range(149))
    # the states that stay are those of row 0: the row goes on as it does alone
    alone = ExitDecoder(model, model.make_cache(1, 150), batch_size=1, rule=rule)
    for each in ids[:1].T.tolist()[:-1]:
        alone.decode_one_token(each, [0])
    for each in (decoder, alone):
        each._routed._router._exits[0].bounds = each._routed._router._exits[
            1
        ].bounds  # now the last layer is run
    last = ids[:1, -1].tolist()
    ours, theirs = decoder.decode_one_token(last, [0]), alone.decode_one_token(last, [0])
    assert ours.exit_layers == theirs.exit_layers == [LAYERS]
    assert torch.equal(ours.logits, theirs.logits)


def test_a_score_that_is_not_a_number_names_its_exit(make_model, make_ids):
    model = make_model(dtype=torch.float32, exit_head="norm", **SHAPE)
    fitted = gates()
    fitted.gates["gain"][2].out_proj.bias.fill_(torch.nan)
    policy = ThresholdPolicy(thresholds=(torch.inf, 0.0, 0.0))
    rule = ExitRule(policy=policy, confidence="gain", fitted=fitted)
    with pytest.raises(ValueError, match="exit layer 2: expected gain scores"):
        forced_exits(model, make_ids(1, 2), rule)


@pytest.mark.parametrize(
    ("ids", "rows", "places"),
    [([99], [0], [0]), ([1], [1], [0]), ([1], [0], [8]), ([-1], [0], [0])],
)
def test_places_that_the_cache_does_not_have_are_refused(make_model, ids, rows, places):
    model = make_model(dtype=torch.float32, **SHAPE)
    decoder = ExitDecoder(model, model.make_cache(1, 8), batch_size=1)
    decoder.decode_one_token([1], [0])
    with pytest.raises(ValueError, match="ids, rows and positions"):
        decoder._routed._router.step(ids, rows, places, [0], decoder.work)


def test_a_model_without_kernels_for_it_has_no_router(make_model):
    for fields in ({"dtype": torch.float64}, {"dtype": torch.float32, "num_attention_heads": 16}):
        model = make_model(**{**SHAPE, **fields})
        decoder = ExitDecoder(model, model.make_cache(1, 8), batch_size=1)
        decoder.decode_one_token([1], [0])
        assert decoder._routed._router is None
