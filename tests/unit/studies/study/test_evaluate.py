"""What is measured of a model whose exits are complete, and of one that is chosen by decoding."""

import numpy as np
import pytest
import torch

from offramp.data import batches
from offramp.evaluation.cost import model_cost
from offramp.evaluation.routed import collect_routed
from offramp.evaluation.trace import collect_trace
from offramp.exits.policy import GainPolicy, ThresholdPolicy
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.studies.study import evaluate as module
from offramp.studies.study.evaluate import DECODED_AT, PROPAGATED_AT, SHARES, evaluate
from offramp.studies.study.frontier import FrontierKey, full_depth
from offramp.studies.study.plan import GateFit

MEASURES = ("gain", "max_prob")
GATES = GateFit(tokens=300, steps=30)


def made(source, exits=(1, 2)):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        exit_layers=exits,
        exit_head="norm",
        kv_source_layer=source,
    )
    return Transformer(config).eval()


@pytest.fixture(scope="module")
def texts():
    ids = torch.randint(0, 11, (331,), generator=torch.Generator().manual_seed(1))
    return {"held_out": ids[:200], "test": ids}


def evaluated(model, texts, **changed):
    ids = texts["test"]
    return evaluate(
        model, ids, texts, measures=MEASURES, gates=GATES, seq_len=16, seed=0, **changed
    )


@pytest.fixture(scope="module")
def decoded(texts):
    return evaluated(made(None), texts, decoding=True)


def test_complete_exits_are_exact_and_take_no_pass(texts):
    model = made(1)
    found = evaluated(model, texts)
    expected = {full_depth(name) for name in texts} | {
        FrontierKey(text=name, confidence=measure, missing_kv="exact")
        for name in texts
        for measure in MEASURES
    }
    assert found.frontiers.keys() == expected
    assert found.routed_passes == {}
    cost = model_cost(model, context=8.5)
    frontier = found.frontiers[FrontierKey(text="test", confidence="max_prob", missing_kv="exact")]
    assert len(frontier.thresholds) == len(SHARES) + 2
    flops, nll = frontier.curve()
    for place in (5, 20, 35):
        threshold = float(frontier.thresholds[place])
        passed = collect_routed(
            model,
            batches(texts["test"], seq_len=16, batch_size=8),
            ThresholdPolicy(thresholds=(threshold, threshold)),
        )
        costs = np.asarray(cost.flops_pct_by_exit("max_prob", missing_kv="propagate"))
        assert nll[place] == pytest.approx(passed.nll.mean(), abs=1e-5)
        assert flops[place] == pytest.approx(costs[passed.exits].mean())


@pytest.mark.parametrize(("source", "exits"), [(2, (1, 2)), (None, (1, 2)), (3, (2,))])
def test_one_exit_below_the_source_makes_both_meanings_differ(texts, source, exits):
    found = evaluated(made(source, exits), texts)
    meanings = {key.missing_kv for key in found.frontiers if key.confidence}
    assert meanings == {"recompute", "propagate"}
    assert all(len(passes) == len(PROPAGATED_AT) for passes in found.routed_passes.values())
    held = {key for key in found.frontiers if key.text == "held_out"}
    assert not any(key.missing_kv == "propagate" for key in held)


def test_a_run_that_is_chosen_by_decoding_knows_propagate_on_held_out_text(decoded):
    of = {
        key.text: frontier
        for key, frontier in decoded.frontiers.items()
        if (key.confidence, key.missing_kv) == ("gain", "propagate")
    }
    assert set(of) == {"held_out", "test"}
    assert all(len(frontier.thresholds) == len(DECODED_AT) + 2 for frontier in of.values())
    assert len(of["held_out"].tokens) == 1
    assert list(map(len, decoded.routed_passes.values())) == [len(DECODED_AT)] * 2
    other = FrontierKey(text="held_out", confidence="max_prob", missing_kv="propagate")
    assert other not in decoded.frontiers  # nothing is chosen by it


def test_its_policies_weigh_what_propagate_costs(texts, decoded):
    model = made(None)
    fitted = module._fit_gates(model, texts["test"], ("gain",), GATES, seq_len=16, seed=0)
    cost = model_cost(model, context=8.5, fitted=fitted)
    costs = cost.flops_pct_by_exit("gain", missing_kv="propagate")
    assert costs != cost.flops_pct_by_exit("gain")
    windows = list(batches(texts["held_out"], seq_len=16, batch_size=8))
    trace = collect_trace(model, iter(windows), measures=("gain",), fitted=fitted)
    key = FrontierKey(text="held_out", confidence="gain", missing_kv="propagate")
    frontier = decoded.frontiers[key]
    flops, nll = frontier.curve()
    for place in (3, 6, 9):
        threshold = float(frontier.thresholds[place])
        assert threshold in np.quantile(
            trace.confidence["gain"][0].astype(np.float64), 1 - np.asarray(DECODED_AT)
        )
        policy = GainPolicy(price=max(0.0, -threshold) / (costs[-1] - costs[0]), costs=costs)
        passed = collect_routed(model, iter(windows), policy, confidence="gain", fitted=fitted)
        assert nll[place] == pytest.approx(passed.nll.mean(), abs=1e-5)
        assert flops[place] == pytest.approx(np.asarray(costs)[passed.exits].mean())
