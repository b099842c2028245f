"""offramp confidence and calibrate, as they are typed."""

import json

import pytest


@pytest.fixture(scope="module")
def model(tmp_path_factory, offramp):
    out = tmp_path_factory.mktemp("calibrate") / "model"
    result = offramp(
        *("train", "--corpus", "pangram", "--layers", 3, "--dim", 16, "--heads", 2),
        *("--exits", 1, "--steps", 60, "--seq-len", 32, "--batch-size", 16, "--out", out),
        *("--loss-weights", "asymmetric:0.5", "--lr", "3e-3", "--tracker", "none"),
    )
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The lazy dog jumps over the quick brown fox. " * 500)
    return path


def test_confidence_prints_and_draws(offramp, model, text, tmp_path):
    out = tmp_path / "confidence.json"
    result = offramp("confidence", model, "--corpus", text, "--fit", "pangram", "--out", out)
    assert result.returncode == 0, result.stderr
    content = json.loads(out.read_text())
    names = [measure["confidence"] for measure in content["measures"]]
    assert names == ["max_prob", "margin", "entropy", "saturation", "gate", "gain"]
    for name in names:
        assert name in result.stdout
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "AUROC" in result.stdout


def test_a_certificate_is_written_used_checked_and_refused(offramp, model, text, tmp_path):
    out = tmp_path / "certificate.json"
    result = offramp(
        *("calibrate", model, "--corpus", text, "--risk", "disagreement", "--epsilon", 0.1),
        *("--delta", 0.05, "--out", out),
    )
    assert result.returncode == 0, result.stderr
    certificate = json.loads(out.read_text())
    assert certificate["epsilon"] == 0.1
    assert certificate["n"] == 45 * 500 // 32
    assert "generat" in certificate["assumptions"]["not_covered"]

    swept = offramp("sweep", model, "--corpus", text, "--certificate", out)
    assert swept.returncode == 0, swept.stderr
    assert "FLOPs%" in swept.stdout
    both = offramp("sweep", model, "--corpus", text, "--certificate", out, "--thresholds", "1")
    assert both.returncode == 2

    new = tmp_path / "new.json"
    checked = offramp("calibrate", model, "--corpus", text, "--check", out, "--out", new)
    assert checked.returncode == 0, checked.stderr
    assert json.loads(new.read_text())["verdict"] in ("holds", "undecided")
    assert "promise" in checked.stdout or "Not decided" in checked.stdout

    out.write_text(json.dumps({**certificate, "epsilon": 0.01}))
    edited = offramp("sweep", model, "--corpus", text, "--certificate", out)
    assert edited.returncode == 2
    assert "was edited" in edited.stderr
    assert "Traceback" not in edited.stderr


def test_a_budget_is_kept(offramp, model, text, tmp_path):
    out = tmp_path / "budget.json"
    result = offramp("calibrate", model, "--corpus", text, "--compute-budget", 70, "--out", out)
    assert result.returncode == 0, result.stderr
    [row] = json.loads(out.read_text())["rows"]
    assert row["flops_pct"] <= 70


def test_a_certificate_on_generation_is_written_used_and_checked(offramp, model, text, tmp_path):
    out, prompts = tmp_path / "certificate.json", tmp_path / "prompts.jsonl"
    prompts.write_text('"The quick "\n{"prompt": "A lazy "}\n' * 15)
    few = ("--max-new-tokens", 8, "--steps", 4, "--epsilon", 0.3)
    result = offramp(
        *("calibrate", model, "--on", "generation", "--prompts", prompts, *few, "--out", out)
    )
    assert result.returncode == 0, result.stderr
    assert "divergence" in result.stdout
    content = json.loads(out.read_text())
    assert (content["n"], content["missing_kv"]) == (30, "propagate")
    used = offramp("generate", model, "The ", "--certificate", out, "--max-new-tokens", 4)
    assert used.returncode == 0, used.stderr
    other = offramp(
        *("generate", model, "The ", "--certificate", out, "--missing-kv", "recompute"),
    )
    assert other.returncode == 2
    checked = offramp("calibrate", model, "--corpus", text, "--max-prompts", 12, "--check", out)
    assert checked.returncode == 0, checked.stderr
    assert "12 new prompts" in checked.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--on", "generation"], "prompts: expected --prompts FILE or --corpus TEXT, got none"),
        (["--prompts", "x.txt"], "corpus: expected the text to calibrate on, got none"),
        (["--corpus", "pangram", "--rows", "2"], "expected none without --on generation"),
        (["--on", "generation", "--corpus", "pangram", "--rows", "0"], "rows: expected at least 1"),
        (["--on", "generation", "--prompts", "none.txt"], "expected a file, found none"),
        (["--on", "generation", "--corpus", "pangram", "--max-prompts", "9"], "at least 149"),
        (["--on", "speech", "--corpus", "pangram"], "on"),
    ],
)
def test_mistakes_on_generation_are_one_sentence(offramp, model, arguments, said):
    result = offramp("calibrate", model, *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_too_few_sequences_say_how_many_are_needed(offramp, model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("The lazy dog jumps over the quick brown fox. " * 10)
    result = offramp("calibrate", model, "--corpus", text, "--epsilon", 0.02)
    assert result.returncode == 0, result.stderr
    assert "at least 149 sequences" in result.stderr
    assert "full model" in result.stderr


def test_a_text_of_the_training_is_warned_of(offramp, model):
    result = offramp("calibrate", model, "--corpus", "pangram", "--epsilon", 0.1)
    assert result.returncode == 0, result.stderr
    assert "trained on this text" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epsilon", "0"], "epsilon: expected"),
        (["--epsilon", "1.5"], "epsilon: expected"),
        (["--delta", "1"], "delta: expected"),
        (["--risk", "x"], "risk: expected one of"),
        (["--test", "x"], "auto"),
        (["--test", "betting", "--method", "crc"], "test: expected none with crc"),
        (["--confidence", "x"], "confidence: expected one of"),
        (["--confidence", ""], "confidence: expected one of"),
        (["--compute-budget", "65", "--risk", "disagreement"], "expected a promise, a budget or"),
        (["--compute-budget", "5"], "budget"),
        (["--check", "nowhere.json"], "expected a file"),
    ],
)
def test_bad_input_is_one_sentence(offramp, model, text, arguments, said):
    result = offramp("calibrate", model, "--corpus", text, *arguments)
    assert result.returncode == 2, result.stdout
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_empty_text_is_refused(offramp, model, tmp_path):
    text = tmp_path / "empty.txt"
    text.write_text("")
    result = offramp("calibrate", model, "--corpus", text)
    assert result.returncode == 2
    assert "empty" in result.stderr


def test_exits_are_specialised_into_a_new_model(offramp, model, text, tmp_path):
    out = tmp_path / "special"
    quick = ("--steps", 20, "--tokens", 2000, "--compute-budget", 70)
    result = offramp("specialise", model, "--corpus", "pangram", "--out", out, *quick)
    assert result.returncode == 0, result.stderr
    assert "training tokens that left" in result.stdout
    about = json.loads((out / "config.json").read_text())
    assert about["model"]["exit_head"] == "specialist"
    assert about["specialised"]["compute_budget"] == 70
    assert about["training"] == json.loads((model / "config.json").read_text())["training"]
    measured = offramp("confidence", out, "--corpus", text, "--measures", "gain")
    assert measured.returncode == 0, measured.stderr
    generated = offramp("generate", out, "The quick", "--max-new-tokens", 5, "--threshold", 0.2)
    assert generated.returncode == 0, generated.stderr
    more = tmp_path / "more"
    added = ("--first-steps", 20, "--add-exits")
    result = offramp("specialise", model, "--corpus", "pangram", "--out", more, *quick, *added, 2)
    assert result.returncode == 0, result.stderr
    assert "none" in result.stdout  # the new exit had no PPL before
    assert json.loads((more / "config.json").read_text())["model"]["exit_layers"] == [1, 2, 3]
    bad = ("specialise", model, "--corpus", "pangram", "--out", tmp_path / "bad", *quick, *added)
    for layers, said in (("1", "got 1"), ("3", "got 3"), ("0", "got 0"), ("x", "x")):
        result = offramp(*bad, layers)
        assert result.returncode == 2, layers
        assert said in result.stderr
        assert not (tmp_path / "bad").exists()
    again = offramp("specialise", model, "--corpus", "pangram", "--out", out, *quick)
    assert again.returncode == 2
    other = offramp("specialise", tmp_path, "--corpus", "pangram", "--out", tmp_path / "other")
    assert other.returncode == 2
    assert "config.json: expected a file, found none" in other.stderr
    little = offramp(
        "specialise", model, "--corpus", "pangram", "--out", tmp_path / "low", "--compute-budget", 3
    )
    assert little.returncode == 2
    assert "compute_budget: expected at least" in little.stderr
    assert not (tmp_path / "low").exists()
