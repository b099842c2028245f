"""Decoding reads from the device only what decides an exit, and the chosen tokens."""

import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from offramp.exits.gate import FittedExits, Gate
from offramp.exits.policy import Decay, GainPolicy, ThresholdPolicy
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import generate, generate_batch
from offramp.generation.transfer import moved, on_device, read

READS = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu")
ALLOWED = {"transfer.py", "checks.py"}  # checks read positions that are on a CPU only


class HostReads(TorchFunctionMode):
    """Notes the file of each call that waits for a GPU, if the tensor were there."""

    def __init__(self):
        super().__init__()
        self.files = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS or name == "nonzero" or self.by_mask(name, args):
            frame = sys._getframe(1)
            self.files.append(Path(frame.f_code.co_filename).name)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def by_mask(name, args):
        if name not in ("__getitem__", "__setitem__"):
            return False
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(
            isinstance(each, list) or (isinstance(each, torch.Tensor) and each.dtype == torch.bool)
            for each in index
        )


class Watched:
    """A model whose steps are noted."""

    def __init__(self, model, monkeypatch, *, static):
        self.steps = []
        for name in ("run_layers", "project_kv"):
            monkeypatch.setattr(model, name, self.noting(getattr(model, name)))
        monkeypatch.setattr(model, "router", lambda cache, spec: None)
        model.few_tokens.use_static = (
            static  # without, the blocks run as on a GPU that has no graphs
        )
        if not static:
            monkeypatch.setattr(model.few_tokens, "of", lambda h, step=None, some=False: None)
            monkeypatch.setattr(model, "fills_beside", lambda tokens: False)

    def noting(self, run):
        def noted(h, start, stop, *, step, **rest):
            self.steps.append((step, h.shape[1]))
            return run(h, start, stop, step=step, **rest)

        return noted


def gates(model):
    early = model.exit_layers[:-1]
    return FittedExits(
        gates={
            "gain": {
                layer: Gate(model.hidden_size, outputs=len(early) - n).eval()
                for n, layer in enumerate(early)
            }
        },
        draft_vocab=torch.tensor([1, 3, 4, 7, 9, 11]),
    )


CASES = {
    "full depth": {},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "top_k": 8, "repetition_penalty": 1.3},
    "speculative": {"speculative": True, "draft_threshold": 0.1},
    "speculative, sampled": {"speculative": True, "draft_threshold": 0.1, "temperature": 1.0},
    "max_prob": {"threshold": 0.14},
    "recompute": {"threshold": 0.14, "missing_kv": "recompute"},
    "decay": {"threshold": 0.14, "decay": 2.0},
    "gain": {"threshold": -0.69, "confidence": "gain"},
    "a price": {"confidence": "gain"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("static", [True, False])
def test_decoding_reads_little_and_knows_its_positions(make_model, monkeypatch, name, rows, static):
    options = dict(CASES[name])
    if rows > 1 and "speculative" in options:
        pytest.skip("speculation takes one prompt")
    model = make_model(num_hidden_layers=4, exit_layers=(1, 2))
    fitted = gates(model)
    policy = GainPolicy(price=0.01, costs=(0.0, 30.0, 60.0)) if name == "a price" else None
    config = GenerateConfig(max_new_tokens=8, **options)
    watched = Watched(model, monkeypatch, static=static)
    prompts = [[1, 2, 3, 1, 2], [4, 5], [6, 7, 8]][:rows]
    reads = HostReads()
    with reads:
        if rows == 1:
            for _ in generate(model, prompts[0], config, fitted=fitted, policy=policy):
                pass
        else:
            generate_batch(model, prompts, config, fitted=fitted, policy=policy)
    assert watched.steps
    for step, tokens in watched.steps:
        assert step.end == int(step.positions.max()) + 1
        assert step.positions.shape[1] == tokens
    assert set(reads.files) - ALLOWED == set()
    assert "transfer.py" in reads.files


def test_the_reads_are_noted_that_a_gpu_would_wait_for():
    x = torch.arange(4)
    with HostReads() as reads:
        for wait in (
            lambda: int(x[0]),
            lambda: x.tolist(),
            lambda: x[x > 1],
            lambda: x.nonzero(),
            lambda: x[[0, 1]],
            lambda: bool(x[0] == 0),
        ):
            wait()
    assert len(reads.files) == 6


def test_values_come_back_as_they_are():
    x = torch.tensor([0.1, float("nan"), -2.5])
    big, flags = torch.tensor([1 << 40, 3, 0]), torch.tensor([True, False, True])
    [first, second, third] = read(x, big, flags)
    assert first[0] == x[0].item()
    assert second == [1 << 40, 3, 0]
    assert third == [1, 0, 1]
    assert on_device([], torch.device("cpu")).dtype == torch.long
    assert torch.equal(moved(big, torch.device("cpu")), big)


def test_a_decaying_threshold_is_compared_as_the_policy_compares_it(make_model):
    """The comparison on the host is the policy's own, also where a score equals the bound."""
    from offramp.exits.confidence import ExitView
    from offramp.generation.exit_rule import ExitRule

    policy = ThresholdPolicy(thresholds=(0.5, 0.7), decay=Decay(tau=3.0, length=10))
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    view = ExitView(exit_layer=1, logits=logits)
    rule = ExitRule(policy=policy)
    places = [0, 1, 2, 5, 8, 9]
    scores = rule.measure.score(view)
    wanted = policy.leaves(0, scores, torch.tensor(places)).tolist()
    assert rule.evaluate(0, view, places) == (scores.tolist(), wanted)
    assert len(set(wanted)) == 2
