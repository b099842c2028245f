"""The commands' bodies on a tiny trained model: confidence, gates, certificates, budgets, drift."""

import json
import math
from dataclasses import replace

import pytest
import torch

from offramp.calibration.certificate import Certificate
from offramp.calibration.promise import Promise
from offramp.calibration.thresholds import load_thresholds, thresholds_flag
from offramp.commands.calibrate import certify, check, keep_compute_budget
from offramp.commands.confidence import fit, measure_confidence
from offramp.commands.sweep import sweep
from offramp.commands.text import read_text
from offramp.commands.train import start_run
from offramp.commands.train_run import TrainRun
from offramp.errors import CertificateError, CheckpointError, ConfigError, CorpusError
from offramp.exits.gate import GateConfig
from offramp.files import write_json
from offramp.models.fitted import load_fitted
from offramp.models.native.config import DecoderConfig
from offramp.models.open import open_in_memory, open_model
from offramp.report.confidence import (
    certificate_table,
    confidence_table,
    drift_sentence,
    frontier_table,
    ppl_at,
    save_confidence_png,
)
from offramp.training.config import TrainConfig

SENTENCES = [
    "the cat sat on the mat. ",
    "a dog ran to the park. ",
    "it rains a lot here. ",
    "we like tea and cake. ",
]
QUICK = GateConfig(steps=30, batch_size=128)


def random_text(seed, sentences=400):
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(SENTENCES), (sentences,), generator=random)
    return "".join(SENTENCES[index] for index in chosen)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a split of its own to test on."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed, name in enumerate(["train", "valid", "test"]):
        (folder / f"{name}.txt").write_text(random_text(seed))
    return folder


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFRAMP_CACHE", str(tmp_path_factory.mktemp("cache")))
        make_model(folder, corpus)
    return folder


def make_model(folder, corpus):
    config = DecoderConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, exit_layers=(1, 2)
    )
    training = TrainConfig(
        loss_weights="1=0.4,2=0.3,4=0.3", steps=60, seq_len=16, batch_size=16, lr=1e-2
    )
    start_run(TrainRun(corpus=str(corpus), model=config, training=training), folder)
    fit(open_model(folder), str(corpus), config=QUICK, max_tokens=2000)


def test_gates_and_temperatures_are_kept_in_the_folder(model, corpus):
    fitted = load_fitted(model)
    assert {kind: sorted(gates) for kind, gates in fitted.gates.items()} == {
        "gain": [1, 2],
        "gate": [1, 2],
    }
    assert sorted(fitted.temperatures) == [1, 2]
    again = fit(open_model(model), str(corpus), config=QUICK, max_tokens=2000).fitted
    assert torch.equal(again.gate("gain", 1).up_proj.weight, fitted.gate("gain", 1).up_proj.weight)
    assert again.temperatures == fitted.temperatures


def test_confidence_measures_everything_that_the_model_can_have(model, corpus, tmp_path):
    heard = []
    content = measure_confidence(
        open_model(model), str(corpus), on_tokens=lambda *told: heard.append(told)
    )
    assert heard[-1] == (content["n_tokens"], content["n_tokens"])
    names = ["max_prob", "margin", "entropy", "saturation", "patience", "gate", "gain"]
    assert [measure["confidence"] for measure in content["measures"]] == names
    for measure in content["measures"]:
        assert [part["exit_layer"] for part in measure["exits"]] == [1, 2]
        first, *_, last = measure["frontier"]
        assert first["flops_pct"] == pytest.approx(100)
        assert first["ppl"] == pytest.approx(content["exit_ppl"][4])
        assert last["ppl"] == pytest.approx(content["exit_ppl"][1])
        for part in measure["exits"]:
            probability = measure["confidence"] in ("max_prob", "gate")
            assert (part["ece"] is not None) == (part["reliability"] is not None) == probability
    write_json(tmp_path / "confidence.json", content)  # no NaN
    assert confidence_table(content).row_count == 14
    assert frontier_table(content).row_count > 5
    save_confidence_png(content, tmp_path / "confidence.png")
    assert (tmp_path / "confidence.png").read_bytes().startswith(b"\x89PNG")


def test_confidence_can_be_asked_of_some_measures(model, corpus):
    content = measure_confidence(open_model(model), str(corpus), measures=("entropy",))
    assert [measure["confidence"] for measure in content["measures"]] == ["entropy"]
    with pytest.raises(ConfigError, match="got 'top1'"):
        measure_confidence(open_model(model), str(corpus), measures=("top1",))


def test_without_gates_the_measures_of_gates_are_left_out(model, corpus, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (bare / name).write_bytes((model / name).read_bytes())
    content = measure_confidence(open_model(bare), str(corpus))
    assert [m["confidence"] for m in content["measures"]][-1] == "patience"
    with pytest.raises(ConfigError, match="a fitted gate at exit layer 1"):
        certify(open_model(bare), str(corpus), Promise(), confidence="gate")


def test_a_certificate_is_used_by_sweep_and_check(model, corpus, tmp_path):
    promise = Promise(epsilon=0.2, delta=0.1)
    certificate, reading = certify(open_model(model), str(corpus), promise, confidence="gate")
    assert not certificate.is_full_model
    assert certificate.n == (reading.trace(()).num_tokens) // 16
    assert not reading.seen_in_training
    file = tmp_path / "certificate.json"
    certificate.save(file)
    assert certificate_table(json.loads(file.read_text())).row_count == 9
    swept = sweep(open_model(model), str(corpus), stored=load_thresholds(file))
    assert tuple(swept["rows"][0]["threshold"]) == certificate.thresholds
    assert swept["rows"][0]["compute_pct"] == pytest.approx(
        certificate.expected_compute_pct, abs=0.5
    )
    found = check(open_model(model), str(corpus), Certificate.load(file))
    assert found["same_corpus"]
    assert found["verdict"] == "holds"
    assert "The promise holds" in drift_sentence(found)
    (tmp_path / "other.txt").write_text("zzz qqq xxx. " * 400)
    other = check(open_model(model), str(tmp_path / "other.txt"), Certificate.load(file))
    assert not other["same_corpus"]
    assert drift_sentence(other).startswith(("The promise is broken", "Not decided"))


def test_a_text_that_grows_at_its_end_may_be_checked_again(model, corpus, tmp_path):
    """The first sequences are the same, so the p-values never rise."""
    certificate, _ = certify(open_model(model), str(corpus), Promise(epsilon=0.2))
    text, growing = random_text(7), tmp_path / "growing.txt"
    checks = []
    for share in (0.1, 0.5, 1.0):
        growing.write_text(text[: int(share * len(text))])
        checks.append(check(open_model(model), str(growing), certificate))
    assert checks[0]["n"] < checks[1]["n"] < checks[2]["n"]
    for name in ("p_holds", "p_broken"):
        values = [found[name] for found in checks]
        assert values[1] <= values[0] * 1.001
        assert values[2] <= values[1] * 1.001
    assert checks[2]["verdict"] == "holds"
    assert checks[2]["decided_after"] <= checks[2]["n"]


def test_a_certificate_for_another_model_is_refused_before_the_model_runs(
    model, corpus, tmp_path, monkeypatch
):
    certificate, _ = certify(open_model(model), str(corpus), Promise(epsilon=0.2))
    other = replace(certificate, model_sha256="0" * 64).signed()
    other.save(tmp_path / "other.json")
    monkeypatch.setattr("offramp.commands.text.collect_trace", lambda *a, **k: 1 / 0)
    opened, file = open_model(model), tmp_path / "other.json"
    for use in (
        lambda: sweep(opened, str(corpus), stored=load_thresholds(file)),
        lambda: check(opened, str(corpus), Certificate.load(file)),
    ):
        with pytest.raises(CertificateError, match=f"{certificate.model_sha256}, got one for 0000"):
            use()


def test_new_gates_are_another_model(model, corpus, tmp_path):
    certificate, _ = certify(open_model(model), str(corpus), Promise(epsilon=0.2))
    certificate.save(tmp_path / "c.json")
    kept = (model / "fitted.safetensors").read_bytes()
    try:
        fit(open_model(model), str(corpus), config=replace(QUICK, seed=5), max_tokens=2000)
        with pytest.raises(CertificateError, match="expected one for this model"):
            sweep(open_model(model), str(corpus), stored=load_thresholds(tmp_path / "c.json"))
    finally:
        (model / "fitted.safetensors").write_bytes(kept)
    assert Certificate.load(tmp_path / "c.json") == certificate


def test_too_little_text_certifies_the_full_model(model, tmp_path):
    (tmp_path / "short.txt").write_text(random_text(9, sentences=4))
    promise = Promise(epsilon=0.02)
    certificate, _ = certify(open_model(model), str(tmp_path / "short.txt"), promise)
    assert certificate.is_full_model
    assert certificate.n < promise.sequences_needed == 149
    assert certificate.thresholds == (math.inf, math.inf)


def test_a_budget_is_kept_and_its_file_is_read_back(model, corpus, tmp_path):
    content = keep_compute_budget(open_model(model), str(corpus), 70.0, confidence="gain")
    [row] = content["rows"]
    assert row["flops_pct"] <= 70
    assert (content["compute_budget"], content["confidence"]) == (70.0, "gain")
    file = tmp_path / "budget.json"
    write_json(file, content)
    opened, stored = open_model(model), load_thresholds(file)
    [swept] = sweep(opened, str(corpus), stored=stored)["rows"]
    assert swept == row
    flag = thresholds_flag(stored.thresholds)
    assert tuple(map(float, flag.split(":"))) == stored.thresholds == row["threshold"]
    with pytest.raises(ConfigError, match="compute_budget: expected at least"):
        keep_compute_budget(open_model(model), str(corpus), 5.0)


def test_text_that_the_model_was_trained_on_is_marked(model, corpus, tmp_path):
    assert not read_text(
        open_model(model), str(corpus)
    ).seen_in_training  # it has a split to test on
    single = tmp_path / "single.txt"
    single.write_text(random_text(0))
    config = json.loads((model / "config.json").read_text())
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    config["corpus"]["sha256"] = read_text(open_model(model), str(single)).corpus.sha256
    (folder / "config.json").write_text(json.dumps(config))
    assert read_text(open_model(folder), str(single)).seen_in_training


def test_bad_input_is_one_sentence(model, corpus, tmp_path):
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(CorpusError, match="empty corpus"):
        certify(open_model(model), str(tmp_path / "empty.txt"), Promise())
    with pytest.raises(CheckpointError):
        certify(open_model(tmp_path / "nowhere"), str(corpus), Promise())
    opened = open_model(model)
    with pytest.raises(ConfigError, match="the folder of a model"):
        fit(open_in_memory(opened.model, opened.tokenizer), str(corpus))
    with pytest.raises(ConfigError, match="from conservative to bold"):
        certify(open_model(model), str(corpus), Promise(), path=[(0.5, 0.5), (0.9, 0.9)])


def test_the_ppl_between_two_points_of_a_frontier():
    rows = [
        {"flops_pct": 100.0, "ppl": 4.0},
        {"flops_pct": 120.0, "ppl": 4.0},  # asking costs
        {"flops_pct": 60.0, "ppl": 5.0},
    ]
    assert ppl_at(rows, 90.0, "flops_pct") == pytest.approx(4.5)
    assert ppl_at(rows, 110.0, "flops_pct") == pytest.approx(4.0)
    assert ppl_at(rows, 50.0, "flops_pct") is None
