import pytest
import torch

from offramp.errors import ConfigError
from offramp.evaluation import cost as cost_module
from offramp.evaluation.cost import ModelCost, compute_pct, model_cost
from offramp.exits.gate import FittedExits, Gate


@pytest.fixture
def cost():
    """Layers of 10, a head of 20, gates of 1 and 2: the full model is 60."""
    return ModelCost(
        exit_layers=(1, 3, 4),
        context=1.0,
        layers=(10.0, 10.0, 10.0, 10.0),
        heads={1: 20.0, 3: 20.0, 4: 20.0},
        gates={"gate": {1: 1.0, 3: 2.0}},
    )


def pct(*flops):
    return pytest.approx([100 * value / 60 for value in flops])


def test_layers_run_count_every_exit():
    assert compute_pct([1, 2, 1], (1, 2, 4), 4) == pytest.approx(100 * 9 / 16)


def test_a_measure_of_logits_costs_a_head_at_every_exit_that_is_passed(cost):
    assert cost.flops_pct_by_exit("max_prob") == pct(10 + 20, 30 + 40, 40 + 60)


def test_a_gate_costs_the_gates_on_the_way_and_the_head_once(cost):
    assert cost.flops_pct_by_exit("gate") == pct(10 + 1 + 20, 30 + 3 + 20, 40 + 3 + 20)


def test_saturation_costs_the_head_once(cost):
    assert cost.flops_pct_by_exit("saturation") == pct(30, 50, 60)


@pytest.mark.parametrize(
    ("asked", "flops"),
    [
        ([False, False], (30, 50, 60)),
        ([True, False], (30, 70, 80)),
        ([False, True], (30, 50, 80)),
    ],
)
def test_an_exit_where_nobody_asks_costs_nothing_to_pass(cost, asked, flops):
    assert cost.flops_pct_by_exit("max_prob", evaluated=asked) == pct(*flops)


def test_patience_asks_at_every_exit_before_one_that_it_needs(cost):
    assert cost.flops_pct_by_exit("patience", evaluated=[False, True]) == pct(30, 70, 100)
    assert cost.flops_pct_by_exit("patience", evaluated=[True, False]) == pct(30, 70, 80)


def test_a_gate_that_was_not_counted_is_a_config_error(cost):
    with pytest.raises(ConfigError, match="a gain at exit layer 1, got none"):
        cost.flops_pct_by_exit("gain")


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("exit_head", ["shared", "norm", "full"])
def test_the_flops_of_a_native_model_are_those_of_its_matrices(make_model, kv_heads, exit_head):
    """Two for each weight, and 2 x 2 x keys x width for the attention itself."""
    model = make_model(
        dtype=torch.float32,
        num_hidden_layers=4,
        num_key_value_heads=kv_heads,
        exit_layers=(1, 3),
        exit_head=exit_head,
    )
    fitted = FittedExits(gates={"gain": {1: Gate(16, outputs=2, hidden=8), 3: Gate(16, hidden=8)}})
    cost = model_cost(model, context=6.5, fitted=fitted)
    block = model.model.layers[0]
    weights = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    assert cost.layers == pytest.approx([2 * weights + 4 * 6.5 * 16] * 4)
    assert cost.heads == dict.fromkeys((1, 3, 4), 2 * 16 * 13)
    assert cost.gates == {"gain": {1: 2 * (16 * 8 + 8 * 2), 3: 2 * (16 * 8 + 8)}}
    assert cost.full == pytest.approx(sum(cost.layers) + 2 * 16 * 13)
    assert (cost.exit_layers, cost.at((3, 4)).exit_layers) == ((1, 3, 4), (3, 4))


def test_less_than_one_key_is_a_config_error(make_model):
    with pytest.raises(ConfigError, match="context: expected at least 1 key, got 0"):
        model_cost(make_model(), context=0.0)


def test_counting_leaves_no_gradients(make_model):
    model = make_model()
    model_cost(model, context=4.0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compiled_kernels_are_counted_like_what_they_stand_for(make_model):
    fields = {"hidden_size": 64, "exit_layers": (1, 2), "exit_head": "adapter"}
    counted = [
        model_cost(make_model(dtype=dtype, **fields), context=5.0)
        for dtype in (torch.float32, torch.float64)  # float64 has no kernels
    ]
    assert counted[0] == counted[1]
    assert all(counted[0].heads.values())
    assert all(counted[0].keys_values)


def test_a_model_is_counted_once_for_its_exits(make_model, monkeypatch):
    counts, count = [], cost_module._count
    monkeypatch.setattr(cost_module, "_count", lambda *args: counts.append(args) or count(*args))
    model = make_model(exit_layers=(1, 2))
    near, far = (model_cost(model, context=context) for context in (2.0, 5.0))
    assert len(counts) == 1
    assert near.layers < far.layers
    assert near.heads == far.heads
    other = model.with_exits((1, 2), "norm")
    assert model_cost(other, context=2.0).heads == near.heads
    model_cost(make_model(exit_layers=(1,)), context=2.0)
    assert len(counts) == 3
