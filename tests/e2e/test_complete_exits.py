"""A model whose blocks above a layer share their keys and values, from training to decoding."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from offramp import load_checkpoint
from offramp.calibration.certificate import Certificate

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
def certified(offramp, complete, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("certified") / "certificate.json"
    arguments = ("calibrate", complete, "--corpus", text, "--epsilon", "0.6", "--delta", "0.4")
    result = offramp(*arguments, "--out", path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"missing_kv\W+exact", result.stdout)
    return path


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
    caption = '(missing_kv="recompute", exact at exits 2, 3)'
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


def with_certificate(offramp, model, path, *flags):
    command = ("generate", model, "The quick", "--certificate", path, "--max-new-tokens", 6)
    return offramp(*command, *flags, "--json")


@pytest.mark.parametrize("made", ["exact", "recompute", "propagate"])
def test_a_certificate_of_complete_exits_serves_every_choice(
    offramp, complete, certified, tmp_path, made
):
    certificate = Certificate.load(certified)
    assert certificate.missing_kv == "exact"
    path = tmp_path / "certificate.json"
    replace(certificate, missing_kv=made).signed().save(path)
    results = [
        with_certificate(offramp, complete, path, *flags)
        for flags in ((), *(("--missing-kv", kv) for kv in ("propagate", "recompute", "exact")))
    ]
    assert {result.returncode for result in results} == {0}
    found = [json.loads(result.stdout) for result in results]
    assert all(each["tokens"] == found[0]["tokens"] for each in found)
    assert {each["missing_kv"] for each in found} == {"exact"}


def test_a_certificate_is_checked_and_swept_as_exact(offramp, complete, certified, text, tmp_path):
    arguments = ("calibrate", complete, "--corpus", text, "--check", certified)
    content, _ = written(offramp, tmp_path / "check.json", *arguments)
    assert content["missing_kv"] == "exact"
    arguments = ("sweep", complete, "--corpus", text, "--certificate", certified)
    content, _ = written(offramp, tmp_path / "sweep.json", *arguments)
    assert content["missing_kv"] == "exact"


def refuses(result):
    assert result.returncode == 2, result.stderr
    [sentence] = result.stderr.strip().splitlines()
    return sentence


def test_certificates_across_the_change_are_refused(
    offramp, complete, trained, certified, text, tmp_path
):
    """That of a model with a source, for one without, and the reverse."""
    plain = tmp_path / "plain.json"
    arguments = ("calibrate", trained, "--corpus", text, "--epsilon", "0.6", "--delta", "0.4")
    content, _ = written(offramp, plain, *arguments)
    assert content["missing_kv"] == "recompute"
    for model, path in ((complete, plain), (trained, certified)):
        said = "certificate: expected one for this model, sha256"
        assert said in refuses(with_certificate(offramp, model, path))
        for command in (("sweep", "--certificate"), ("calibrate", "--check")):
            out = tmp_path / "none.json"
            words = (command[0], model, "--corpus", text, command[1], path, "--out", out)
            assert said in refuses(offramp(*words))
            assert not out.exists()
    stated = replace(Certificate.load(plain), missing_kv="exact").signed()
    stated.save(tmp_path / "stated.json")
    said = refuses(with_certificate(offramp, trained, tmp_path / "stated.json"))
    assert "missing_kv: expected propagate or recompute, since the model has no complete" in said
    for kv in ("propagate", "exact"):
        said = refuses(with_certificate(offramp, trained, plain, "--missing-kv", kv))
        assert "missing_kv: expected recompute, under which the certificate's guarantee" in said
        assert said.endswith(f"got {kv}")


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
    assert content["complete_exits"] == [1, 2]
    assert " Exits 1, 2 are complete: a token" in content["verdict"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--kv-source", 4), "kv-source: expected from 1 to 3, below the last layer, got 4"),
        (("--kv-source", 9), "kv-source: expected from 1 to 3, below the last layer, got 9"),
        (("--kv-source", 0), "kv-source: expected from 1 to 3, below the last layer, got 0"),
        (("--kv-source", -1), "kv-source: expected from 1 to 3, below the last layer, got -1"),
        (("--layers", 1, "--kv-source", 1), "kv-source: expected none in a model of one layer"),
        (("--kv-source", "2.5"), 'unable to convert "2.5" into int'),
        (("--kv-source", "true"), 'unable to convert "true" into int'),
        (("--kv-source", 10**30), "--kv-source: expected a number below 2^63"),
    ],
)
def test_a_source_that_no_model_can_have_is_one_sentence(offramp, tmp_path, flags, said):
    words = ("train", "--corpus", "pangram", *flags, "--out", tmp_path / "model")
    words = words if "--layers" in flags else (*words, "--layers", 4)
    assert said in refuses(offramp(*words))
    assert not (tmp_path / "model").exists()


def test_a_run_is_not_continued_with_another_source(offramp, complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "model")
    said = refuses(offramp("train", "--resume", folder, "--kv-source", 2))
    assert "resume: expected no other flag" in said
    run = json.loads((folder / "run.json").read_text())
    for source in (2, None):
        run["run"]["model"]["kv_source_layer"] = source
        (folder / "run.json").write_text(json.dumps(run))
        said = refuses(offramp("train", "--resume", folder, "--steps", 40))
        assert "expected a checkpoint of this model" in said


def test_only_the_lower_exits_are_exported(offramp, complete, tmp_path):
    result = offramp("export", complete, "--exit", 2, "--out", tmp_path / "plain")
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 2)
    said = refuses(offramp("export", complete, "--exit", 4, "--out", tmp_path / "deep"))
    assert "expected at most 2, since the blocks above share keys and values" in said
    assert not (tmp_path / "deep").exists()
