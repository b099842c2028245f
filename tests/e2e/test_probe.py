"""offramp probe, as it is typed."""

import json

import numpy as np
import pytest

from offramp import collect_trace, load_checkpoint
from offramp.data import batches, encode
from offramp.models.open import open_model


def test_probe_says_what_the_trace_says(offramp, trained, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown dog jumps over the lazy fox. " * 60)
    out = tmp_path / "probe.json"
    result = offramp("probe", trained, "--corpus", text, "--tokens", 2000, "--out", out)
    assert result.returncode == 0, result.stderr
    content = json.loads(out.read_text())
    assert content["num_layers"] == 4
    assert content["n_tokens"] == 2000
    assert [row["exit_layer"] for row in content["exits"]] == [1, 2, 4]
    assert content["verdict"] in result.stdout.replace("\n", " ")

    model, _ = load_checkpoint(trained)
    ids = encode(open_model(trained).tokenizer, text.read_text())[:2001]
    trace = collect_trace(model, batches(ids, seq_len=32, batch_size=8))
    agree = trace.argmax == trace.argmax[-1]
    for index, row in enumerate(content["exits"]):
        assert row["agreement"] == pytest.approx(agree[index].mean())
        assert row["ppl"] == pytest.approx(trace.ppl(row["exit_layer"]))
        sure = trace.confidence["max_prob"][index] >= 0.5
        assert row["coverage"]["0.5"] == pytest.approx(sure.mean())
        if sure.any():
            assert row["agreement_at"]["0.5"] == pytest.approx(agree[index][sure].mean())
        assert 0 < row["head_cost_layers"] < 1
    first = [
        next(layer for layer, a in zip((1, 2, 4), column, strict=True) if a) for column in agree.T
    ]
    assert content["oracle_layers"] == pytest.approx(np.mean(first))
    assert content["expected_speedup"] >= 1


def test_a_model_without_exits_has_nothing_to_probe(offramp, tmp_path):
    out = tmp_path / "model"
    result = offramp(
        *("train", "--corpus", "pangram", "--layers", 2, "--dim", 16, "--heads", 2),
        *("--loss-weights", "standard", "--exits", 2, "--steps", 1, "--seq-len", 16),
        *("--batch-size", 2, "--out", out, "--tracker", "none"),
    )
    assert result.returncode == 0, result.stderr
    result = offramp("probe", out, "--corpus", "pangram")
    assert result.returncode == 2
    assert "expected at least one before the last" in result.stderr
    result = offramp("probe", out, "--corpus", "pangram", "--tokens", 0)
    assert result.returncode == 2
    assert "tokens: expected at least 1, got 0" in result.stderr
