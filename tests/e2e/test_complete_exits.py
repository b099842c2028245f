"""A model whose blocks above a layer share their keys and values, from training to decoding."""

import json
import re

import pytest

from offramp import load_checkpoint

TRAIN = ("train", "--corpus", "pangram", "--layers", 4, "--dim", 16, "--heads", 2)
SHORT = ("--steps", 30, "--seq-len", 32, "--batch-size", 8, "--lr", "3e-3", "--seed", 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture(scope="module")
def complete(offramp, tmp_path_factory):
    """Exits at 1 and 2, both complete: the source is layer 1."""
    out = tmp_path_factory.mktemp("complete") / "model"
    weights = ("--exits", "1,2", "--loss-weights", "1=0.4,2=0.3,4=0.3", "--exit-head", "norm")
    result = offramp(*TRAIN, *SHORT, *weights, "--kv-source", 1, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def mixed(offramp, tmp_path_factory):
    """Exits at 1, 2 and 3; the source is layer 2, so exit 1 is not complete."""
    folder = tmp_path_factory.mktemp("mixed")
    settings = folder / "run.json"
    settings.write_text(json.dumps({"kv_source": 2, "exits": [1, 2, 3]}))
    result = offramp(*TRAIN, *SHORT, "--config", settings, "--out", folder / "model")
    assert result.returncode == 0, result.stderr
    return folder / "model"


def written(offramp, out, *arguments):
    result = offramp(*arguments, "--out", out)
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text()), result


def test_a_run_keeps_its_source(complete, mixed, trained):
    for folder, source in ((complete, 1), (mixed, 2), (trained, None)):
        for part in ("", "last"):
            assert load_checkpoint(folder / part)[0].config.kv_source_layer == source
        config = json.loads((folder / "config.json").read_text())["model"]
        assert ("kv_source_layer" in config) == (source is not None)


def test_a_sweep_says_exact(offramp, complete, text, tmp_path):
    arguments = ("sweep", complete, "--corpus", text, "--thresholds", "0.2,0.5:0.3")
    content, result = written(offramp, tmp_path / "sweep.json", *arguments)
    assert content["missing_kv"] == "exact"
    assert '(missing_kv="exact")' in " ".join(result.stdout.split())


def test_a_sweep_of_both_kinds_of_exits_says_which_are_exact(
    offramp, mixed, trained, text, tmp_path
):
    arguments = ("--corpus", text, "--thresholds", "0.2")
    content, result = written(offramp, tmp_path / "mixed.json", "sweep", mixed, *arguments)
    assert content["missing_kv"] == "recompute"
    caption = '(missing_kv="recompute", exact at exit 2, 3)'
    assert caption in " ".join(result.stdout.split())
    content, result = written(offramp, tmp_path / "plain.json", "sweep", trained, *arguments)
    assert content["missing_kv"] == "recompute"
    assert '(missing_kv="recompute")' in " ".join(result.stdout.split())


@pytest.mark.parametrize("older", [False, True])
def test_a_sweep_is_drawn_with_its_meaning(offramp, complete, text, tmp_path, older):
    result = tmp_path / "sweep.json"
    content, _ = written(offramp, result, "sweep", complete, "--corpus", text)
    if older:  # as files of before are
        del content["complete_from"]
        result.write_text(json.dumps({**content, "missing_kv": "recompute"}))
    drawn = offramp("plot", result, "--out", tmp_path / "sweep.svg")
    assert drawn.returncode == 0, drawn.stderr
    svg = (tmp_path / "sweep.svg").read_text()
    assert ("exact" in svg, "recompute" in svg) == (not older, older)


@pytest.mark.parametrize("missing_kv", [None, "propagate", "recompute", "exact"])
def test_generate_takes_any_choice_and_says_exact(offramp, complete, missing_kv):
    flags = () if missing_kv is None else ("--missing-kv", missing_kv)
    command = ("generate", complete, "The quick", "--threshold", "0.1", "--max-new-tokens", 8)
    result = offramp(*command, *flags, "--json")
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["missing_kv"] == "exact"
    assert min(token["exit_layer"] for token in content["tokens"]) < 4
    result = offramp(*command, *flags)
    assert 'missing_kv="exact"' in result.stderr


def test_generate_keeps_the_choice_below_the_source(offramp, mixed):
    command = ("generate", mixed, "The quick", "--max-new-tokens", 4)
    for flags, meaning in (
        (("--threshold", "0.1"), "propagate"),
        (("--threshold", "0.1", "--missing-kv", "recompute"), "recompute"),
        (("--threshold", "inf:0.1:0.1"), "exact"),
        ((), None),
    ):
        content = json.loads(offramp(*command, *flags, "--json").stdout)
        assert content["missing_kv"] == meaning
    assert "missing_kv" not in offramp(*command, "--threshold", "0.1").stderr
    refused = offramp(*command, "--threshold", "0.1", "--missing-kv", "exact")
    assert refused.returncode == 2
    assert "exit 1 is below layer 2, from which exits are complete" in refused.stderr
    nonsense = offramp(*command, "--threshold", "0.1", "--missing-kv", "forget")
    assert nonsense.returncode == 2
    assert "forget" in nonsense.stderr


def test_bench_times_complete_exits_once(offramp, complete, mixed, text, tmp_path):
    short = ("--prompts", 1, "--prompt-tokens", 8, "--max-new-tokens", 4, "--repeats", 1)
    arguments = ("--corpus", text, "--thresholds", "0.3", "--compute-pct", 60, *short)
    content, result = written(offramp, tmp_path / "bench.json", "bench", complete, *arguments)
    exits = [row["method"] for row in content["rows"] if row["method"].startswith("exit@")]
    assert len(exits) == 2
    assert all(re.fullmatch(r"exit@[\d.e+-]+:exact", name) for name in exits)
    assert content["failed"] == {}
    assert "(exact)" in result.stdout
    content, _ = written(offramp, tmp_path / "mixed.json", "bench", mixed, *arguments)
    names = {row["method"] for row in content["rows"]}
    assert {"exit@0.3:propagate", "exit@0.3:recompute"} < names


def test_a_certificate_is_exact_and_serves_every_choice(offramp, complete, text, tmp_path):
    path = tmp_path / "certificate.json"
    arguments = ("calibrate", complete, "--corpus", text, "--epsilon", "0.6", "--delta", "0.4")
    content, result = written(offramp, path, *arguments)
    assert content["missing_kv"] == "exact"
    assert re.search(r"missing_kv\W+exact", result.stdout)
    command = ("generate", complete, "The quick", "--certificate", path, "--max-new-tokens", 6)
    found = [
        json.loads(offramp(*command, *flags, "--json").stdout)
        for flags in ((), ("--missing-kv", "propagate"), ("--missing-kv", "recompute"))
    ]
    assert {each["text"] for each in found} == {found[0]["text"]}
    assert {each["missing_kv"] for each in found} == {"exact"}
    checked, _ = written(
        offramp, tmp_path / "check.json", "calibrate", complete, "--corpus", text, "--check", path
    )
    assert checked["missing_kv"] == "exact"
    swept = ("sweep", complete, "--corpus", text, "--certificate", path)
    content, _ = written(offramp, tmp_path / "sweep.json", *swept)
    assert content["missing_kv"] == "exact"


def test_a_compute_budget_counts_the_shared_projection(offramp, complete, text, tmp_path):
    path = tmp_path / "budget.json"
    command = ("calibrate", complete, "--corpus", text)
    content, _ = written(offramp, path, *command, "--compute-budget", 95)
    assert content["missing_kv"] == "exact"
    content = json.loads(
        offramp("generate", complete, "The", "--certificate", path, "--json").stdout
    )
    assert content["missing_kv"] == "exact"
    refused = offramp(*command, "--compute-budget", 5, "--out", tmp_path / "none.json")
    assert refused.returncode == 2
    assert re.search(r"compute_budget: expected at least [\d.]+% of the full", refused.stderr)
    assert not (tmp_path / "none.json").exists()


def test_what_is_fitted_and_specialised_says_exact(offramp, complete, text, tmp_path):
    special = tmp_path / "special"
    arguments = ("specialise", complete, "--corpus", "pangram", "--compute-budget", 90)
    result = offramp(*arguments, "--tokens", 2000, "--steps", 10, "--out", special)
    assert result.returncode == 0, result.stderr
    content, _ = written(
        offramp, tmp_path / "confidence.json", "confidence", special, "--corpus", text
    )
    assert content["missing_kv"] == "exact"
    assert load_checkpoint(special)[0].config.kv_source_layer == 1


def test_probe_says_exact(offramp, complete, text, tmp_path):
    content, _ = written(offramp, tmp_path / "probe.json", "probe", complete, "--corpus", text)
    assert (content["missing_kv"], content["complete_from"]) == ("exact", 1)
