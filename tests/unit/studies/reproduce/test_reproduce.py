"""Tables and claims of the reproduction, on traces made by hand (no training)."""

import json
import re

import numpy as np
import pytest

from offramp.data import load_corpus
from offramp.errors import CheckpointError, ConfigError, CorpusError
from offramp.evaluation.trace import ExitTrace
from offramp.files import write_json
from offramp.studies.reproduce import study as reproduction
from offramp.studies.reproduce.config import ReproduceConfig, minutes_text
from offramp.studies.reproduce.grid import more_methods
from offramp.studies.reproduce.methods import (
    ALL_LAYERS,
    ALPHA_07,
    METHODS,
    Study,
    load_study,
)
from offramp.studies.reproduce.power import WANTED_POWER, power, required_seeds
from offramp.studies.reproduce.published import TEXT_THRESHOLD
from offramp.studies.reproduce.run import RunResult

TOKENS = 700


def make_trace(num_layers, rng, nll, confidence):
    shape = (num_layers, TOKENS)
    targets = rng.integers(0, 30, TOKENS)
    argmax = np.where(rng.random(shape) < 0.6, targets, rng.integers(0, 30, shape))
    return ExitTrace(
        num_layers=num_layers,
        exit_layers=tuple(range(1, num_layers + 1)),
        targets=targets,
        nll=(nll + rng.gamma(2.0, 0.5, shape)).astype(np.float32),
        argmax=argmax,
        confidence={"max_prob": (rng.random(shape) ** confidence).astype(np.float32)},
    )


def make_study(seeds, nll=None, confidence=None, corpus="pangram", more=()):
    """Methods differ by what is added to every token's NLL and by how sure they are."""
    nll, confidence = nll or {}, confidence or {}
    runs = {}
    for key, method in {**METHODS, **{method.key: method for method in more}}.items():
        results = []
        for seed in range(seeds):
            rng = np.random.default_rng([seed, method.num_layers])
            arguments = (method.num_layers, rng, nll.get(key, 1.0), confidence.get(key, 0.2))
            about = {
                "model": {"vocab_size": 30},
                "training": {
                    "seq_len": 64,
                    "batch_size": 32,
                    "lr": 1e-3,
                    "grad_clip": 1.0,
                    "patience": 0,
                    "epochs": 50,
                },
                "parameters": 1,
                "train_tokens": 100_000,
                "validation_tokens": 8193,
                "unknown_tokens": 2,
                "validations": [{"epoch": 2}],
            }
            trace = make_trace(*arguments)
            results.append(RunResult(about=about, best=trace, last=trace))
        runs[key] = tuple(results)
    return Study(corpus=load_corpus(corpus), seeds=tuple(range(seeds)), runs=runs, more=more)


def all_rows(summary):
    return [row for table in summary["tables"].values() for row in table]


def test_every_table_of_the_document_is_there_with_its_published_figures():
    tables = reproduction.summarise(make_study(2))["tables"]
    published = {
        name: [row["published"]["ppl"] for row in table if row["published"]]
        for name, table in tables.items()
    }
    assert published["exp5_results"][:3] == [24.88, 23.98, 22.95]
    assert published["exp5_thresholds"] == [41.62, 40.48, 40.57, 36.94, 31.46]
    assert set(published["exp6_results"]) == {22.95, 32.07}
    assert published["exp6_thresholds"] == [40.48, 50.24, 40.57, 51.46, 36.94, 53.10, 31.46, 54.90]
    assert published["baselines"] == [34.86, 35.29]
    assert {row["epoch"] for row in tables["exp5_results"]} == {"best"}
    assert {row["epoch"] for row in tables["exp5_thresholds"]} == {"last"}


def test_published_figures_stand_only_beside_the_corpus_they_come_from():
    rows = all_rows(reproduction.summarise(make_study(2, corpus="python-docs")))
    assert {row["published"] for row in rows} == {None}


def test_compute_is_100_minus_two_thirds_of_shallow_in_every_row():
    for row in all_rows(reproduction.summarise(make_study(3))):
        measured = row["measured"]
        pairs = zip(
            measured["shallow_pct"]["values"], measured["compute_pct"]["values"], strict=True
        )
        for shallow, compute in pairs:
            assert compute == pytest.approx(100 - shallow * 2 / 3, abs=1e-10)


def test_experiment_6_weights_every_layer_and_exits_at_1_or_3():
    row = reproduction.summarise(make_study(1))["tables"]["exp6_results"][1]
    assert row["loss_weights"] == pytest.approx({"1": 0.7, "2": 1.0, "3": 0.3})
    assert ALL_LAYERS.exits == (1, 3)


def test_the_literal_comparison_stands_beside_the_one_at_equal_threshold():
    rows = reproduction.summarise(make_study(1))["tables"]["exp6_results"]
    thresholds = {(row["label"], row["threshold"]) for row in rows}
    assert thresholds == {
        ("asymmetric, α = 0.7", 0.95),
        ("all layers, α = 0.7 (literal)", 0.7),
        ("all layers, α = 0.7 (equal threshold)", 0.95),
        ("asymmetric, α = 0.7 (equal threshold)", 0.7),
    }


def test_claims_that_are_true_of_the_traces_hold():
    better = {key: 1.0 + 0.2 * (key != ALPHA_07.key) for key in METHODS}
    findings = reproduction.summarise(make_study(5, nll=better))["findings"]
    assert [finding["id"] for finding in findings] == [1, 2, 3, 4, 5, 6]
    assert {finding["verdict"] for finding in findings} == {"holds"}
    assert all(finding["n_seeds"] == 5 for finding in findings)
    middle = findings[4]["effect_pct"]["mean"]
    assert middle == pytest.approx(100 * np.expm1(0.2), abs=3.0)


def test_claims_that_are_false_of_the_traces_do_not_hold():
    worse = {key: 1.0 + 0.2 * (key == ALPHA_07.key) for key in METHODS}
    findings = reproduction.summarise(make_study(5, nll=worse))["findings"]
    assert {finding["verdict"] for finding in findings} == {"does not hold"}


def test_one_seed_decides_nothing_and_is_still_json():
    summary = reproduction.summarise(make_study(1))
    for finding in summary["findings"]:
        assert finding["p_value"] is None
        assert finding["verdict"] == "undecided"
    json.dumps(summary, allow_nan=False)


def test_a_middle_loss_that_makes_the_exit_surer_is_noticed():
    surer = {key: 0.05 if key == ALL_LAYERS.key else 0.5 for key in METHODS}
    explanations = reproduction.summarise(make_study(4, confidence=surer))["explanations"]
    assert explanations[0]["answer"] == "yes"


def test_nobody_leaving_early_leaves_no_nan_behind():
    never = dict.fromkeys(METHODS, 40.0)  # u ** 40 >= .95 is rare
    summary = reproduction.summarise(make_study(2, confidence=never))
    json.dumps(summary, allow_nan=False)


def test_the_passage_is_the_text_with_the_exit_of_each_character():
    study = make_study(1)
    passage = reproduction.summarise(study)["passages"][0]
    confidence = study.runs[ALPHA_07.key][0].best.confidence["max_prob"][0]
    assert "".join(passage["characters"]) == study.corpus.validation[1:641]
    for layer, score in zip(passage["exit_layer"], confidence, strict=False):
        assert layer == (1 if score >= np.float32(0.95) else 3)


def test_the_plan_follows_the_flags():
    assert ReproduceConfig().plan() == [("pangram", 8), ("python-docs", 4)]
    assert ReproduceConfig(quick=True).plan() == [("pangram", 2)]
    assert ReproduceConfig(corpus="python-docs").plan() == [("python-docs", 4)]
    assert ReproduceConfig(corpus="pangram", seeds=1).plan() == [("pangram", 1)]
    full = dict(ReproduceConfig(full=True).plan())
    assert full == {"pangram": required_seeds("pangram"), "python-docs": required_seeds("x")}
    assert full["pangram"] > 8
    with pytest.raises(ConfigError, match="seeds: expected at least 1, got 0"):
        ReproduceConfig(seeds=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"full": True, "quick": True},
            "full: expected neither quick nor seeds with it, got quick",
        ),
        ({"full": True, "seeds": 3}, "got seeds 3"),
        ({"alphas": (0.1, 1.5)}, "alphas: expected numbers from 0 to 1, got 1.5"),
        ({"alphas": (float("nan"),)}, "alphas: expected numbers from 0 to 1, got nan"),
        ({"alphas": (0.1, 0.1)}, "alphas: expected each number once, got 0.1 twice"),
        ({"thresholds": (-0.1,)}, "thresholds: expected numbers from 0 to 1, got -0.1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        ReproduceConfig(**options)


def test_the_seeds_of_full_give_every_finding_its_power():
    for name in ("pangram", "python-docs"):
        needed = required_seeds(name)
        assert power(name, needed)["lowest"] >= WANTED_POWER > power(name, needed - 1)["lowest"]
        assert power(name, 2)["lowest"] == 0.0


def test_the_time_is_said_in_words():
    assert minutes_text(72, 2) == "about 6 minutes on 2 free cores"
    assert minutes_text(0, 1) == "about 1 minute on 1 free core"


def test_the_size_stands_beside_the_direction():
    better = {key: 1.0 + 0.1 * (key != ALPHA_07.key) for key in METHODS}
    findings = reproduction.summarise(make_study(5, nll=better))["findings"]
    assert findings[4]["published_pct"] == pytest.approx(39.7, abs=0.1)
    low, high = findings[4]["ci_pct"]
    assert low < 100 * np.expm1(0.1) < high < findings[4]["published_pct"]
    assert [finding["size"] for finding in findings][1::3] == ["smaller", "smaller"]
    assert findings[0]["size"] == findings[2]["size"] == "larger"
    assert findings[5]["size"] is None
    assert findings[5]["ci_pct"] is not None


def test_two_seeds_decide_nothing():
    better = {key: 1.0 + 0.5 * (key != ALPHA_07.key) for key in METHODS}
    summary = reproduction.summarise(make_study(2, nll=better))
    for finding in summary["findings"]:
        assert finding["verdict"] == "undecided"
        assert finding["size"] in (None, "undecided")
        assert finding["ci_pct"] is None
    assert {question["answer"] for question in summary["explanations"]} == {"undecided"}


def test_text_is_tested_where_tokens_leave():
    summary = reproduction.summarise(make_study(3, corpus="python-docs"))
    assert summary["protocol"]["threshold"] == TEXT_THRESHOLD
    assert {row["threshold"] for row in summary["tables"]["exp5_results"]} == {0.25, 0.7}
    assert "routed at 0.25" in summary["findings"][1]["test"]
    assert summary["passages"][0]["threshold"] == TEXT_THRESHOLD
    assert {row["threshold"] for row in summary["tables"]["baselines"]} == {None}


def test_chosen_alphas_and_thresholds_are_rows_beside_the_documents():
    more = more_methods((0.1, 0.7, 0.9))
    assert [method.key for method in more] == ["alpha-0.1", "alpha-0.9"]  # 0.7 is there already
    study = make_study(3, more=more)
    summary = reproduction.summarise(study, (0.0, 0.9))
    weights = [row["loss_weights"]["1"] for row in summary["grid"][::2]]
    assert weights == [0.1, 0.3, 0.5, 0.7, 0.9, 0.7]  # the last one has the middle loss
    assert [row["threshold"] for row in summary["grid"][:2]] == [0.0, 0.9]
    assert summary["grid"][0]["measured"]["shallow_pct"]["mean"] == 100.0
    assert {curve["label"] for curve in summary["curves"]} >= {"asymmetric, α = 0.1"}
    assert reproduction.summarise(make_study(3))["grid"] == []
    documented = reproduction.summarise(make_study(3))
    assert summary["findings"] == documented["findings"]  # about the document's methods only
    json.dumps(summary, allow_nan=False)


def test_the_protocol_of_the_document():
    run = reproduction.plan_runs(load_corpus("pangram"), 1, device="cpu")[2]
    assert run.name == "alpha-0.7-seed0"
    training = run.training
    assert (training.seq_len, training.batch_size, training.lr) == (64, 32, 1e-3)
    assert (training.grad_clip, training.patience, training.select_at) == (1.0, 0, 0.95)
    assert not training.shuffle
    text = reproduction.plan_runs(load_corpus("python-docs"), 1, device="cpu")[2]
    assert text.training.epochs == 2


def test_text_is_cut_to_the_documents_lengths_and_short_text_is_refused(tmp_path):
    cut = reproduction.cut(load_corpus("python-docs"))
    assert (len(cut.train), len(cut.validation)) == (100_000, 10_000)
    short = tmp_path / "short.txt"
    short.write_text("abc " * 1000)
    corpus = reproduction.cut(load_corpus(str(short)))
    training = reproduction.plan_runs(corpus, 1, device="cpu")[0].training
    with pytest.raises(CorpusError, match="expected at least 2049 validation characters"):
        reproduction.check_lengths(corpus, training)


def go_on(out, config, corpora):
    with reproduction.go_on_or_claim(out, config, corpora):
        pass


def test_a_folder_is_gone_on_with_only_under_the_same_settings(tmp_path):
    corpora = [(load_corpus("pangram"), 2)]
    out = tmp_path / "out"
    go_on(out, ReproduceConfig(quick=True), corpora)
    go_on(out, ReproduceConfig(quick=True), corpora)
    grid = tmp_path / "grid"
    for _ in range(2):
        go_on(grid, ReproduceConfig(alphas=(0.1, 0.9), thresholds=(0.5,)), corpora)
    with pytest.raises(CheckpointError, match="unfinished run with other settings"):
        go_on(grid, ReproduceConfig(alphas=(0.1, 0.8), thresholds=(0.5,)), corpora)
    with pytest.raises(CheckpointError, match="unfinished run with other settings"):
        go_on(out, ReproduceConfig(seeds=2), [(load_corpus("pangram"), 3)])
    finished = tmp_path / "finished"
    finished.mkdir()
    write_json(finished / "results.json", {})
    with pytest.raises(
        CheckpointError, match="holds another run or other files; choose another --out"
    ):
        go_on(finished, ReproduceConfig(quick=True), corpora)


def test_whole_seeds_are_those_with_every_method(tmp_path):
    runs = reproduction.plan_runs(load_corpus("pangram"), 2, device="cpu")
    for run in runs[:-1]:
        (tmp_path / run.name).mkdir()
    assert reproduction.whole_seeds(runs, tmp_path) == [0]
    with pytest.raises(CheckpointError):
        load_study(load_corpus("pangram"), tmp_path, [0])
