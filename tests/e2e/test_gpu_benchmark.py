"""The script that compares ways to decode on a GPU runs on a CPU, and outlives a row that fails."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_that_fails_says_why_and_the_others_have_figures(
    script, monkeypatch, tmp_path, capsys
):
    def hf(options, model, texts, *, static):
        if static:
            raise RuntimeError("no compiler | was found\nat this place")
        return {"tokens_per_s": 10.0, "first_token_ms": 1.0}

    monkeypatch.setattr(script, "hf", hf)
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "--out", str(out)])
    script.main()
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 14
    failed = [row for row in rows.values() if "why" in row]
    assert [row["way"] for row in failed] == ["hf static + compile"] * 2
    assert failed[0]["why"] == "RuntimeError: no compiler / was found"
    for row in rows.values():
        assert len(row["samples"]) == ("why" not in row)
        for sample in row["samples"]:
            assert sample["tokens_per_s"] > 0
            assert sample["first_token_ms"] > 0
    exits = [row for row in rows.values() if row["way"].startswith("exit")]
    assert all(1 < row["samples"][0]["layers"] < 8 for row in exits)
    printed = capsys.readouterr().out
    assert printed.count("RuntimeError: no compiler / was found") == 4  # at once, and in the table
    assert "CPU, torch" in printed


def test_a_model_that_cannot_be_opened_is_left_out(script, monkeypatch, tmp_path, capsys):
    def fails():
        raise ValueError("it is not installed")

    monkeypatch.setattr(script, "models", lambda options: [fails])
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "--out", str(out)])
    script.main()
    assert "left out: ValueError: it is not installed" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"]["model 1"] == {
        "why": "ValueError: it is not installed"
    }


def test_a_device_that_is_missing_is_named(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "device cuda is not available; use --device cpu" in capsys.readouterr().err
