"""Studies: what is compared, and that a study goes on where it was stopped."""

import math
import shutil
from dataclasses import replace

import pytest

from offramp.cli import main
from offramp.errors import CheckpointError, ConfigError, CorpusError
from offramp.files import read_json, write_json
from offramp.studies.study.config import StudyConfig
from offramp.studies.study.plan import Recipe
from offramp.studies.study.studies import STUDIES
from offramp.studies.study.study import (
    Workers,
    go_on_or_claim,
    plan_runs,
    run_study,
    study_named,
    study_text,
)
from offramp.studies.study.summary import check_equal_tokens
from offramp.studies.study.timing import timings

TEXT = "The exits of a model stand after its blocks. " * 80


class Watcher:
    def __init__(self):
        self.done = []

    def on_plan(self, name, total, tokens):
        self.planned = (total, tokens)

    def on_progress(self, progress):
        pass

    def on_done(self, name):
        self.done.append(name)


@pytest.fixture
def tiny():
    study = STUDIES["objectives"]
    model = replace(
        study.model,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        exit_layers=(1,),
    )
    study = replace(
        study,
        name="tiny",
        tokenizer="characters",
        model=model,
        training=replace(study.training, seq_len=16, batch_size=4, warmup_steps=0),
        tokens=640,
        test_tokens=200,
        recipes=(
            Recipe(label="half", training={"loss_weights": "asymmetric:0.5"}),
            Recipe(label="all", training={"loss_weights": "deep_supervision"}),
        ),
        static_layers=(1, 3),
        seeds=2,
    )
    return study


def test_a_study_does_what_is_missing_and_ends_with_the_same_figures(tiny, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    out = tmp_path / "study"
    config = StudyConfig(corpus=str(path))
    watcher = Watcher()
    first = run_study(
        tiny, config, out, watcher=watcher, workers=Workers(folder=out / "runs", jobs=2)
    )
    assert watcher.planned == (8, 8 * 640)
    assert len(watcher.done) == 8
    written = read_json(out / "study.json")
    assert [row["label"] for row in written["summary"]] == ["half", "half", "all", "all"]
    assert {entry["layers"] for entry in written["static"]} == {1, 3}
    assert len(written["summary"]) == 2 * 2  # recipes x meanings of the missing cache
    for entry in first["runs"]:
        assert entry["config"]["training"]["seed"] == entry["seed"]
        assert entry["confidence"] == "max_prob"
        for kv in ("recompute", "propagate"):
            columns = entry["frontiers"]["max_prob"][kv]
            assert columns["threshold"][0] == -math.inf
            assert columns["threshold"][-1] == math.inf
            assert columns["compute_pct"][0] == pytest.approx(100 / 3)  # all leave after 1 of 3
            assert columns["ppl"][0] == pytest.approx(entry["exit_ppl"][1])
            assert columns["flops_pct"][-1] == pytest.approx(100)
            assert columns["ppl"][-1] == pytest.approx(entry["exit_ppl"][3])
            points = zip(columns["compute_pct"], columns["ppl"], columns["threshold"], strict=True)
            assert entry["frontier"][kv] == [list(point) for point in points]
    for row in first["summary"]:
        for ratios in ("ratio_to_static_at", "ratio_to_standard_at", "ppl_at"):
            assert set(row[ratios]) == {"50", "60", "65", "80", "100"}
        assert row["p_value"] == row["to_static"]["p_holm"]
    times = read_json(out / "timing.json")
    assert [entry["layers"] for entry in times["static"]] == [1, 3]
    assert [entry["label"] for entry in times["routed"]] == ["half", "all"]
    assert all(entry["points"][0]["seconds_pct"] > 0 for entry in times["routed"])
    runs = plan_runs(tiny, study_text(config))
    for run in runs:  # as if every full pass took its layers in seconds, and every other one
        passes = {"full": [run.model.num_hidden_layers], "max_prob": [1.5] * 5}
        seconds = {"train": 1.0, "specialise": 0.5, "evaluate": 2.0}
        timed = {"seconds": seconds, "passes": passes}
        write_json(out / "runs" / run.name / "timing.json", timed)
    times = timings(runs, out / "runs", threads=1)
    assert times["seconds"] == {"train": 8.0, "specialise": 4.0, "evaluate": 16.0}
    shallow, standard = (entry["seconds_pct"] for entry in times["static"])
    assert 0 < shallow < standard == 100.0
    for entry in times["routed"]:
        assert [point["seconds_pct"] for point in entry["points"]] == [50.0] * len(entry["points"])
        columns = [
            run["frontiers"]["max_prob"]["propagate"]["ppl"]
            for run in first["runs"]
            if run["label"] == entry["label"]
        ]
        means = [sum(ppl) / len(ppl) for ppl in zip(*columns, strict=False)]
        assert [point["ppl"] for point in entry["points"]] == pytest.approx(
            means[1 : 1 + len(entry["points"])]
        )
    written = (out / "study.json").read_bytes()
    shutil.rmtree(out / "runs" / first["runs"][0]["name"])
    one = Workers(folder=out / "runs", jobs=1)
    run_study(tiny, config, out, watcher=Watcher(), workers=one)
    assert (out / "study.json").read_bytes() == written
    assert "seconds" not in written.decode()
    assert (out / "report.html").read_text().count("<figure>") == 5
    assert (
        read_json(out / "runs" / first["runs"][1]["name"] / "timing.json")["seconds"]["train"] > 0
    )
    model = out / "runs" / first["runs"][1]["name"]
    assert not main(["sweep", str(model), "--corpus", str(path), "--out", str(tmp_path / "s.json")])
    assert "## Static models" in (out / "table.md").read_text()
    assert (out / "figure.png").stat().st_size > 1000
    with pytest.raises(CheckpointError, match="tokens differ: stored"):
        run_study(tiny, replace(config, tokens=64), out, watcher=Watcher(), workers=one)


def test_runs_are_named_by_what_their_figures_depend_on(tiny, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    config = StudyConfig(corpus=str(path))
    runs = plan_runs(tiny, study_text(config))
    assert len({run.name for run in runs}) == len(runs)
    assert [run.name for run in plan_runs(tiny, study_text(config))] == [run.name for run in runs]
    relabelled = replace(runs[0], label="other")
    assert relabelled.name == runs[0].name
    path.write_text(TEXT + "More.")
    assert plan_runs(tiny, study_text(config))[0].name != runs[0].name


def test_no_summary_compares_different_budgets(tiny, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    config = StudyConfig(corpus=str(path))
    runs = plan_runs(tiny, study_text(config))
    check_equal_tokens(runs)
    longer = replace(runs[0], training=replace(runs[0].training, steps=99))
    with pytest.raises(ValueError, match="one budget"):
        check_equal_tokens([*runs, longer])


def test_what_is_no_study_is_refused():
    with pytest.raises(
        ConfigError, match="expected one of objectives, alpha, middle, exits, heads, got 'x'"
    ):
        study_named("x")
    with pytest.raises(ConfigError, match="tokens: expected at least 1, got 0"):
        StudyConfig(corpus="pangram", tokens=0)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("a..b:6379", "nothing answers at a..b:6379"),
        ("127.0.0.1:9", "nothing answers at 127.0.0.1:9"),
        ("ray://127.0.0.1:9", "nothing answers at ray://127.0.0.1:9"),
        ("somewhere", "expected auto, HOST:PORT or ray://HOST:PORT, got 'somewhere'"),
    ],
)
def test_a_cluster_that_does_not_answer_is_named(tiny, tmp_path, address, message):
    pytest.importorskip("ray")
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    out = tmp_path / "study"
    workers = Workers(folder=out / "runs", ray=address)
    with pytest.raises(ConfigError, match=message):
        run_study(tiny, StudyConfig(corpus=str(path)), out, watcher=Watcher(), workers=workers)
    assert not out.exists()


def test_a_study_of_another_version_is_refused(tiny, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    out = tmp_path / "study"
    out.mkdir()
    (out / "settings.json").write_text('{"format": 1, "study": "tiny"}')
    workers = Workers(folder=out / "runs")
    with pytest.raises(CheckpointError, match="one of another offramp version, of format 1"):
        run_study(tiny, StudyConfig(corpus=str(path)), out, watcher=Watcher(), workers=workers)


def test_a_kill_while_the_folder_is_claimed_is_no_obstacle(tmp_path):
    out = tmp_path / "study"
    out.mkdir()
    (out / ".settings.json.1.tmp").write_text('{"form')
    go_on_or_claim(out, {"study": "tiny"})
    assert [path.name for path in out.iterdir()] == ["settings.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        go_on_or_claim(tmp_path / "other", {"study": "tiny"})


def test_the_test_text_is_never_trained_on(tmp_path):
    text, test = tmp_path / "text.txt", tmp_path / "test.txt"
    test.write_text("What a study is judged on is not what it learns from. " * 9)
    text.write_text(TEXT + test.read_text())
    with pytest.raises(CorpusError, match="test: expected text that is not trained on"):
        study_text(StudyConfig(corpus=str(text), test=str(test)))
    folder = tmp_path / "splits"
    folder.mkdir()
    (folder / "train.txt").write_text(TEXT)
    (folder / "test.txt").write_text(test.read_text())
    found = study_text(StudyConfig(corpus=str(folder), test=str(test)))
    assert "judged" not in found.train + found.held_out


def test_runs_that_cannot_be_kept_are_refused_before_anything_is_written(tiny, tmp_path):
    path, out = tmp_path / "text.txt", tmp_path / "study"
    path.write_text(TEXT)
    workers = Workers(folder=path / "of" / "runs")
    with pytest.raises(CheckpointError, match=r"text\.txt: expected a folder for the runs, got a"):
        run_study(tiny, StudyConfig(corpus=str(path)), out, watcher=Watcher(), workers=workers)
    assert not out.exists()


def test_what_runs_would_refuse_is_refused_before_anything_is_written(tiny, tmp_path):
    path, out = tmp_path / "text.txt", tmp_path / "study"
    path.write_text(TEXT)
    training = {"loss_weights": "asymmetric:0.5", "backbone_steps": 10}
    late = replace(tiny, recipes=(Recipe(label="late", training=training),))
    config, workers = StudyConfig(corpus=str(path)), Workers(folder=out / "runs")
    with pytest.raises(
        ConfigError, match=r"tokens: expected enough for .* 'late', got 640 a run: backbone_"
    ):
        run_study(late, config, out, watcher=Watcher(), workers=workers)
    path.write_text("too few")
    with pytest.raises(CorpusError, match="expected at least 65 tokens to train on"):
        run_study(tiny, config, out, watcher=Watcher(), workers=workers)
    assert not out.exists()
