import math

import pytest
import torch

from offramp.commands.bench.clocks import measure_clocks
from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.task import Task
from offramp.errors import ConfigError
from offramp.evaluation import stopwatch
from offramp.evaluation.timer import TOKENS, measure_bandwidth, measure_clock
from offramp.exits.gate import FittedExits, Gate
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate
from offramp.models.native.fast import kernels
from offramp.models.native.fast.router import CompiledRouter
from offramp.models.native.quantise import quantised
from offramp.models.native.quantised_weight import QuantisedWeight

needs_kernels = pytest.mark.skipif(kernels._compiled is None, reason="the kernels were not built")


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("confidence", ["max_prob", "saturation"])
def test_every_part_of_a_model_is_measured(make_model, rows, confidence):
    model = make_model(num_hidden_layers=4, exit_layers=(1, 2), exit_head="norm")
    fitted = FittedExits(draft_vocab=torch.tensor([1, 2, 3]))
    clock = measure_clock(
        model, context=9, bandwidth=1e9, confidence=confidence, fitted=fitted, rows=rows, rounds=1
    )
    weights = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
    assert clock.block.bytes == pytest.approx(8 * (weights + 2 * 9 * 16))  # and 9 keys and values
    assert set(clock.block.seconds) == set(clock.keys_values.seconds) == set(TOKENS)
    assert set(clock.heads) == {1, 2, 4}
    assert set(clock.heads[1].seconds) == (set(TOKENS) if rows else {1})
    assert len(clock.heads[4].seconds) > 1  # it verifies several drafts
    assert set(clock.evaluations) == set(clock.drafts) == {1, 2}
    assert clock.drafts[1].flops == pytest.approx(clock.heads[1].flops * 3 / 13)
    if confidence == "saturation":
        assert clock.evaluations[1].flops == 0
    every = [clock.block, clock.keys_values, *clock.heads.values(), *clock.evaluations.values()]
    assert all(seconds > 0 for each in every for seconds in each.seconds.values())
    generation = generate(model, [1, 2], GenerateConfig(max_new_tokens=5, threshold=0.1))
    list(generation)
    assert clock.seconds(generation.work, 5) > 0


def test_keys_and_values_are_those_of_a_block_that_writes_them(make_model, monkeypatch):
    """Blocks that share keys and values write none, and ``Work`` does not count them."""

    def seconds_of(part, *_, **__):
        """A call that runs no block takes 3 seconds, any other 12."""
        ends = [each for each in getattr(part, "args", ())[2:] if isinstance(each, int)]
        return 3.0 if ends == [0] else 12.0

    monkeypatch.setattr("offramp.evaluation.timer.seconds_of", seconds_of)
    shape = {"num_hidden_layers": 6, "exit_layers": (2,)}
    clocks = [
        measure_clock(make_model(**shape, kv_source_layer=source), context=9, bandwidth=1e9)
        for source in (None, 2)
    ]
    for clock, writers in zip(clocks, (6, 3), strict=True):
        assert clock.keys_values.seconds[max(TOKENS)] == 12.0 / writers
        assert clock.block.seconds[1] == (12.0 - 3.0) / 6
    own, shared = (clock.keys_values for clock in clocks)
    assert own.flops == shared.flops > 0


def test_a_gate_is_a_part_that_must_be_there(make_model):
    with pytest.raises(ConfigError, match="gate"):
        measure_clock(make_model(), context=3, bandwidth=1e9, confidence="gate", rounds=1)


def test_the_bandwidth_is_that_of_a_machine(monkeypatch):
    monkeypatch.setattr("offramp.evaluation.timer.BANDWIDTH_BYTES", 1 << 24)
    assert 1e8 < measure_bandwidth(rounds=1) < 1e13


def gates_of(model):
    """Gates of gain at every exit before the last."""
    early = model.exit_layers[:-1]
    gates = {
        layer: Gate(model.hidden_size, outputs=len(early) - index).requires_grad_(False)
        for index, layer in enumerate(early)
    }
    return FittedExits(gates={"gain": gates})


@pytest.fixture
def quantised_task(make_model):
    """Tokens that leave by gain or max_prob, in a model of 8 bits."""
    model = make_model(dtype=torch.float32, hidden_size=64, exit_layers=(1, 2), exit_head="norm")
    model = quantised(model, "int8")
    config = BenchConfig(prompts=1, prompt_tokens=4, max_new_tokens=4)
    return Task(model=model, fitted=gates_of(model), config=config, prompts=[[[1, 2, 3, 4]]])


@pytest.fixture
def timing(monkeypatch):
    """The calls that are timed at the moment: FLOPs are counted beside them, with gradients."""
    now, once = [], stopwatch._once

    def noted(part):
        now.append(part)
        seconds = once(part)
        now.pop()
        return seconds

    monkeypatch.setattr(stopwatch, "_once", noted)
    return now


def watched(monkeypatch, where, name, timing):
    """The timed calls in which a method is called."""
    found, method = [], getattr(where, name)

    def noted(*args, **about):
        found.extend(timing)
        return method(*args, **about)

    monkeypatch.setattr(where, name, noted)
    return found


@needs_kernels
def test_parts_of_quantised_weights_are_timed_by_the_products_of_decoding(
    quantised_task, timing, monkeypatch
):
    """Products with gradients, or without kernels, would make numbers of the whole matrix first."""
    wide = watched(monkeypatch, QuantisedWeight, "dequantised", timing)
    assert torch.is_grad_enabled()
    clocks = measure_clocks(quantised_task, 1e9)
    assert list(clocks.exits) == ["gain", "max_prob"]
    assert not wide


@needs_kernels
def test_gates_are_timed_in_the_call_that_decoding_uses(quantised_task, timing, monkeypatch):
    modules = watched(monkeypatch, Gate, "forward", timing)
    calls = watched(monkeypatch, CompiledRouter, "step", timing)
    clocks = measure_clocks(quantised_task, 1e9)
    assert calls
    assert not modules
    evaluations = clocks.exits["gain"].evaluations
    assert evaluations[1].seconds == evaluations[2].seconds
    full = quantised_task.method("", threshold=math.inf, confidence="gain").run([[1, 2, 3, 4]])
    assert full.work.evaluations.keys() == {(layer, 1) for layer in evaluations}


def test_without_kernels_gates_are_timed_as_modules(make_model, timing, monkeypatch):
    model = make_model(exit_layers=(1, 2))  # float64
    evaluated = watched(monkeypatch, Gate, "forward", timing)
    clock = measure_clock(
        model, context=3, bandwidth=1e9, confidence="gain", fitted=gates_of(model), rounds=1
    )
    assert evaluated
    assert clock.evaluations.keys() == {1, 2}
