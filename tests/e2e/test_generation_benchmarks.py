"""The scripts that measure promises on generation and audits run on a tiny model, and resume."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.calibration.audit import Audit
from offramp.commands.on_generation.config import WriteConfig
from offramp.commands.on_generation.writer import Writer, prompts_of_text
from offramp.data.tokenizer import make_tokenizer
from offramp.exits.gate import FittedExits, Gate
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.models.open import open_in_memory

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT = "".join(f"{n} quick brown foxes jump over {n * 7 % 31} lazy dogs. " for n in range(90))


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def opened():
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        exit_layers=(1, 3),
        max_position_embeddings=64,
    )
    model = Transformer(config).eval()
    model.exits.trained = True
    found = open_in_memory(model, make_tokenizer("characters", TEXT))
    return dataclasses.replace(found, fitted=FittedExits(gates={"gain": {1: Gate(16)}}))


@pytest.fixture
def run(opened, tmp_path, monkeypatch, capsys):
    """Run a script on the tiny model with --record and return what it printed."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def call(module, *arguments):
        shown = ["x.py", "model", "--text", text, "--record", tmp_path / "r.json", *arguments]
        monkeypatch.setattr(module, "open_model", lambda path, dtype: opened)
        monkeypatch.setattr(sys, "argv", [str(each) for each in shown])
        module.main()
        return capsys.readouterr().out

    return call


SPLITS = ("--prompts", 80, "--prompt-tokens", 8, "--max-new-tokens", 6, "--windows", 70)
SPLITS = (*SPLITS, "--prices", 0.001, 0.6, 0.7, 5, "--splits", 3, "--threads", 1)


def test_splits_are_certified_checked_and_resumed(run, opened, tmp_path):
    module = script("generation_splits")
    printed = run(module, *SPLITS, "--timed", 0)
    record = json.loads((tmp_path / "r.json").read_text())
    assert len(record["batches"]) == 5
    rows = [line for line in printed.splitlines() if " of 3 |" in line]
    assert [row.split(" |")[0] for row in rows] == [
        f"| {risk} <= {epsilon:g}" for risk, every in module.RISKS.items() for epsilon in every
    ]
    assert all(" 0 of 3 |" in row for row in rows)  # each promise is kept
    assert "nan x" in rows[0]

    config = WriteConfig(max_prompts=80, prompt_tokens=8, max_new_tokens=6, rows=16)
    writer = Writer(
        opened,
        prompts_of_text(opened, str(tmp_path / "text.txt"), config),
        config,
        confidence="gain",
    )
    early = writer.write((-5.0,))
    for risk in module.RISKS:
        kept = [row[-1] for batch in record["batches"] for row in batch[risk]]
        assert kept == pytest.approx(writer.losses(early, risk).tolist(), abs=2e-6)

    del record["batches"][3:]
    record["batches"][0]["divergence"][0][0] = 0.125  # the parts that are there stay
    (tmp_path / "r.json").write_text(json.dumps(record))
    again = run(module, *SPLITS, "--timed", 1)
    assert "batch 4 of 5" in again
    assert "batch 3 of 5" not in again
    resumed = json.loads((tmp_path / "r.json").read_text())
    assert resumed["batches"][0]["divergence"][0][0] == 0.125
    assert len(resumed["seconds"][0]) == 5
    with pytest.raises(SystemExit, match=r"r\.json: expected"):
        run(module, *SPLITS, "--max-new-tokens", 7)


def test_a_promise_that_is_broken_fails(tmp_path):
    module = script("generation_splits")
    record = module.Record(tmp_path / "r.json", {})
    record.content["text"] = {"disagreement": np.zeros((80, 4)).tolist()}
    whole = ("divergence", "rouge-l", "nll-gap", "layers")
    random = np.random.default_rng(0)
    half = (random.random((80, 4)) < 0.01).astype(float)
    record.content["batches"] = [{name: half.tolist() for name in whole}]
    honest = module.promise_row(record, "divergence", 0.25, 3, (1, 2, 3, 4), 20, [1.0] * 5)
    assert "| 0 of 20 | 0 | 0 |" in honest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "certified", lambda losses, promise: 4)  # certify all there is
        record.content["batches"] = [{name: np.ones((80, 4)).tolist() for name in whole}]
        broken = module.promise_row(record, "divergence", 0.25, 3, (1, 2, 3, 4), 20, [1.0] * 5)
    assert "| 20 of 20 | 20 | 0 |" in broken


AUDIT = ("--tokens", 60, "--prompt-tokens", 8, "--max-new-tokens", 10, "--price", 5, "--seeds", 3)
AUDIT = (*AUDIT, "--rounds", 1, "--texts", 1, "--streams", 1, "--share", 0.3)


def test_an_audit_costs_agrees_and_flags_a_change(run, tmp_path, monkeypatch):
    module = script("audit_cost")
    monkeypatch.setattr(module, "BEFORE", 30)
    monkeypatch.setattr(module, "MOST", 60)
    printed = run(module, *AUDIT)
    assert "cost: " in printed
    assert "agree: 60 tokens, 54 left; " in printed  # the first token of a text never leaves
    assert "held at all times with 3 of 3 seeds" in printed
    assert "change: tokens that leave: 90%, then 90%" in printed
    assert printed.count("flagged after") == 4
    record = json.loads((tmp_path / "r.json").read_text())
    assert [len(record[name]) for name in ("text", "source")] == [6, 6]
    assert [text[0] for text in record["text"]] == [None] * 6
    del record["text"][4:]
    (tmp_path / "r.json").write_text(json.dumps(record))
    again = run(module, *AUDIT, "--parts", "agree")
    assert "text: 6 of 6" in again
    assert again.splitlines()[-2:] == [line for line in printed.splitlines() if "bounds" in line]
    record["text"][0][1] = [1.0, 0.123]
    (tmp_path / "r.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="agree: expected"):
        run(module, *AUDIT, "--parts", "agree", "--share", 1)


def test_a_bound_that_is_too_low_is_counted(monkeypatch):
    module = script("audit_cost")
    tokens = [None, *[(1.0, 0.5)] * 60]
    assert module.replay(tokens, 0, 0.5, 1)[3]
    monkeypatch.setattr(Audit, "most_lost", property(lambda self: 0.9 * self.tokens_left))
    assert not module.replay(tokens, 0, 0.5, 1)[3]


def test_a_change_that_is_known_is_flagged_at_once():
    module = script("audit_cost")
    ratios = module.class_ratios(np.zeros(1000), np.ones(1000))
    losses = np.repeat([0.0, 1.0], [module.BEFORE, 50])
    assert module.delay(module.Known(ratios, 5000).observe, losses) <= 3
    assert module.delay(module.Known(1 / ratios, 5000).observe, losses[:1000]) == module.MOST
