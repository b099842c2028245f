"""Studies: what is compared, and that a study goes on where it was stopped."""

import math
import shutil
from dataclasses import replace

import pytest

from offramp.cli import main
from offramp.errors import CheckpointError, ConfigError, CorpusError
from offramp.report.study_json import read_study, read_times
from offramp.studies.study import timing
from offramp.studies.study.chosen import chosen_study
from offramp.studies.study.config import StudyConfig
from offramp.studies.study.decoding import decoding_times, time_decoding
from offramp.studies.study.done import Done
from offramp.studies.study.grid import plan_runs
from offramp.studies.study.plan import Recipe
from offramp.studies.study.record import RunTiming
from offramp.studies.study.studies import STUDIES
from offramp.studies.study.study import go_on_or_claim, run_study
from offramp.studies.study.summary import check_equal_tokens
from offramp.studies.study.texts import study_text
from offramp.studies.study.workers import Workers

TEXT = "The exits of a model stand after its blocks. " * 80


class Watcher:
    def __init__(self):
        self.done, self.timed = [], None

    def on_plan(self, name, total, tokens):
        self.planned = (total, tokens)

    def on_timing(self, passes, tokens):
        self.timed = (passes, tokens)

    def on_decoding(self, policies, prompt_tokens, new_tokens):
        self.decoded = (policies, prompt_tokens, new_tokens)

    def on_progress(self, progress):
        pass

    def on_done(self, name):
        self.done.append(name)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A whole study of two processes; a test that changes its files takes a copy."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text(TEXT)
    config = StudyConfig(corpus=str(folder / "text.txt"))
    out, watcher = folder / "study", Watcher()
    workers = Workers(folder=out / "runs", jobs=2)
    result = run_study(tiny, config, out, watcher=watcher, workers=workers)
    return config, out, watcher, result


def copied(whole, tmp_path):
    return shutil.copytree(whole[1], tmp_path / "copy")


def test_a_study_does_what_is_missing_and_ends_with_the_same_figures(tiny, whole, tmp_path):
    config, _, watcher, first = whole
    out, path = copied(whole, tmp_path), config.corpus
    assert watcher.planned == (8, 8 * 640)
    assert len(watcher.done) == 8
    assert watcher.timed == (2 * 3, 8 * 32 * 16)  # 2 depths, 3 rounds
    assert read_study(out / "study.json") == first
    assert [row.label for row in first.rows] == ["half", "half", "all", "all"]
    assert {model.layers for model in first.static} == {1, 3}
    for model in first.runs:
        assert model.config["training"]["seed"] == model.seed
        assert model.confidence == "max_prob"
        for kv in ("recompute", "propagate"):
            curve = model.frontiers["max_prob"][kv]
            assert curve.threshold[0] == -math.inf
            assert curve.threshold[-1] == math.inf
            assert curve.compute_pct[0] == pytest.approx(100 / 3)  # all leave after 1 of 3
            assert curve.ppl[0] == pytest.approx(model.exit_ppl[1])
            assert curve.flops_pct[-1] == pytest.approx(100)
            assert curve.ppl[-1] == pytest.approx(model.exit_ppl[3])
            points = zip(curve.compute_pct, curve.ppl, curve.threshold, strict=True)
            assert model.frontier[kv] == tuple(points)
    for row in first.rows:
        for ratios in (row.ratio_to_static_at, row.ratio_to_standard_at, row.ppl_at):
            assert set(ratios) == {50, 60, 65, 80, 100}
        assert row.p_value == row.to_static.p_holm
    times = read_times(out / "timing.json")
    assert [entry.layers for entry in times.static] == [1, 3]
    assert [entry.label for entry in times.routed] == ["half", "all"]
    assert all(entry.points[0].seconds_pct > 0 for entry in times.routed)
    written = (out / "study.json").read_bytes()
    shutil.rmtree(out / "runs" / first.runs[0].name)
    one = Workers(folder=out / "runs", jobs=1)
    run_study(tiny, config, out, watcher=(again := Watcher()), workers=one)
    assert again.timed is None  # that is kept
    assert read_times(out / "timing.json").static == times.static
    assert (out / "study.json").read_bytes() == written
    assert "seconds" not in written.decode()
    assert (out / "report.html").read_text().count("<figure>") == 5 + 2
    model = out / "runs" / first.runs[1].name
    assert RunTiming.load(model).seconds["train"] > 0
    assert not main(["sweep", str(model), "--corpus", str(path), "--out", str(tmp_path / "s.json")])
    assert "## Static models" in (out / "table.md").read_text()
    assert (out / "figure.png").stat().st_size > 1000
    with pytest.raises(CheckpointError, match="tokens differ: stored"):
        run_study(tiny, replace(config, tokens=64), out, watcher=Watcher(), workers=one)


def test_exact_recipes_stand_beside_others_as_they_decode(tiny, tmp_path):
    path, out = tmp_path / "text.txt", tmp_path / "study"
    path.write_text(TEXT)
    weights = {"loss_weights": "asymmetric:0.5"}
    study = replace(
        tiny,
        decoding=True,
        shared_static=((3, 1),),
        seeds=1,
        recipes=(
            Recipe(label="complete", training=weights, model={"kv_source_layer": 1}),
            Recipe(label="usual", training=weights),
        ),
    )
    workers = Workers(folder=out / "runs", jobs=1)
    result = run_study(
        study, StudyConfig(corpus=str(path)), out, watcher=Watcher(), workers=workers
    )
    assert result.families == [("max_prob", "propagate"), ("max_prob", "recompute")]
    meanings = [(row.label, row.missing_kv) for row in result.rows]
    assert meanings == [("complete", "exact"), ("usual", "propagate"), ("usual", "recompute")]
    for family in result.families:
        assert [row.label for row in result.family(*family)] == ["complete", "usual"]
    assert [(model.layers, model.source) for model in result.static] == [
        (3, None),
        (1, None),
        (3, 1),
    ]
    shared, usual = result.static[2], result.static[0]
    assert shared.flops_pct < usual.flops_pct == 100
    curve = result.runs[0].curve("max_prob", "propagate")
    assert len(curve.ppl) == 39 + 2
    assert curve.flops_pct[-1] == pytest.approx(shared.flops_pct)
    assert read_study(out / "study.json") == result
    assert [entry.label for entry in read_times(out / "timing.json").routed] == ["usual"]
    table = (out / "table.md").read_text()
    assert "complete (exact)" in table
    assert "| usual (" not in table
    assert "Exact: the exits are complete" in table
    assert "shared from layer 1" in table
    assert any("Sharing keys and values alone" in answer for answer in result.answers)
    assert any("and the cache that decodes" in answer for answer in result.answers)
    assert "static 3, source 1" in (out / "report.html").read_text()


def test_kept_runs_are_summarised_without_a_model(tiny, whole, tmp_path, monkeypatch):
    config, first = whole[0], copied(whole, tmp_path)
    workers, watcher = Workers(folder=first / "runs"), Watcher()
    for name in ("new_model", "full_pass_seconds"):
        monkeypatch.setattr(timing, name, None)
    for run in plan_runs(tiny, study_text(config)):
        (workers.folder / run.name / "model.safetensors").unlink()
    second = run_study(tiny, config, tmp_path / "second", watcher=watcher, workers=workers)
    assert watcher.timed is None
    assert second == read_study(first / "study.json")
    assert read_times(tmp_path / "second" / "timing.json").static == ()
    page = (tmp_path / "second" / "report.html").read_text()
    assert "The static models were not timed" in page
    assert "Decoding was not timed: the weights of the runs are not there." in page


def test_decoding_is_timed_beside_the_ppl_of_each_policy(tiny, whole, tmp_path):
    config, out, watcher, result = whole
    kept = read_times(out / "timing.json").decoding
    assert watcher.decoded == (len(kept.policies), kept.prompt_tokens, kept.new_tokens)
    assert (kept.prompt_tokens, kept.new_tokens) == (201 - 16, 16)  # the test text is short
    labels = [each.label for each in kept.policies]
    assert list(dict.fromkeys(labels)) == ["standard", "static 1", "half", "all"]
    assert kept.environment["threads"] == 1
    for each in kept.policies:
        assert set(each.tokens_per_s) == set(each.first_token_s) == {1, 8}
        assert min(each.tokens_per_s.values()) > 0
    standard, static, *routed = kept.policies
    assert set(standard.to_standard.values()) == set(standard.first_to_standard.values()) == {1.0}
    assert standard.flops_pct == 100.0
    assert static.mean_layers == {1: 1.0, 8: 1.0}
    assert standard.ppl == pytest.approx(
        sum(model.ppl for model in result.static if model.layers == 3) / 2
    )
    for label in ("half", "all"):
        curves = [
            run.frontiers["max_prob"]["propagate"] for run in result.runs if run.label == label
        ]
        full, *policies = [each for each in routed if each.label == label]
        assert full.confidence is None
        assert full.mean_layers == {1: 3.0, 8: 3.0}
        assert policies
        for each in policies:
            place = curves[0].threshold.index(each.threshold)
            assert each.ppl == pytest.approx(sum(curve.ppl[place] for curve in curves) / 2)
            assert each.flops_pct == pytest.approx(
                sum(curve.flops_pct[place] for curve in curves) / 2
            )
            share = curves[0].compute_pct[place] / 100
            assert each.mean_layers[8] == pytest.approx(3 * share, abs=0.3)
    lines = (out / "decoding.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * len(kept.policies)
    assert "Measured time of decoding" in (out / "report.html").read_text()
    folder = copied(whole, tmp_path)
    for run in plan_runs(tiny, study_text(config)):
        (folder / "runs" / run.name / "model.safetensors").unlink()
    runs = plan_runs(tiny, study_text(config))
    about = {"threads": 1, "on_decoding": None}
    assert time_decoding(runs, folder / "runs", **about) is None
    assert decoding_times(runs, folder / "runs", folder, **about) == kept  # not timed again
    assert decoding_times(runs, folder / "runs", tmp_path, **about) is None


def test_times_are_percent_of_a_full_pass(tiny, whole, tmp_path):
    out = copied(whole, tmp_path)
    runs = plan_runs(tiny, study_text(whole[0]))
    for run in runs:  # as if every full pass took its layers in seconds, and every other one 1.5
        RunTiming(
            seconds={"train": 1.0, "specialise": 0.5, "evaluate": 2.0},
            passes={"full": [float(run.model.num_hidden_layers)], "max_prob": [1.5] * 5},
            environment={},
        ).save(out / "runs" / run.name)
    times = timing.timings(runs, out / "runs", out)
    assert times.seconds == {"train": 8.0, "specialise": 4.0, "evaluate": 16.0}
    kept = read_times(out / "timing.json").static
    assert [entry.seconds_pct for entry in times.static] == [entry.seconds_pct for entry in kept]
    assert [entry.layers for entry in kept] == [1, 3]
    assert kept[-1].seconds_pct == 100.0
    result = read_study(out / "study.json")
    for entry in times.routed:
        assert [point.seconds_pct for point in entry.points] == [50.0] * len(entry.points)
        columns = [
            run.frontiers["max_prob"]["propagate"].ppl
            for run in result.runs
            if run.label == entry.label
        ]
        means = [sum(ppl) / len(ppl) for ppl in zip(*columns, strict=True)]
        assert [point.ppl for point in entry.points] == pytest.approx(means[1:-1])


def test_static_models_are_timed_before_the_first_run(tiny, tmp_path, monkeypatch):
    path, out = tmp_path / "text.txt", tmp_path / "study"
    path.write_text(TEXT)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Workers, "do", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_study(
            tiny,
            StudyConfig(corpus=str(path)),
            out,
            watcher=Watcher(),
            workers=Workers(folder=out / "runs"),
        )
    times = read_times(out / "timing.json")
    assert [(entry.layers, entry.ppl) for entry in times.static] == [(1, None), (3, None)]
    assert times.static[1].seconds_pct == 100.0


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
        ConfigError,
        match="expected one of objectives, alpha, middle, exits, heads, kv, scale, got 'x'",
    ):
        chosen_study("x")
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
    with go_on_or_claim(out, {"study": "tiny"}):
        assert [path.name for path in out.iterdir()] == ["settings.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    refused = pytest.raises(CheckpointError, match="expected a new or empty folder")
    with refused, go_on_or_claim(tmp_path / "other", {"study": "tiny"}):
        pass


def test_a_damaged_run_is_named_with_what_to_do(tmp_path):
    """The run's folder is to be removed, since the same command then does the run anew."""
    run = tmp_path / "runs" / "0123"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"label": ')
    (run / "frontiers.npz").write_bytes(b"")
    (run / "timing.json").write_text("[]")
    done = Done(run=None, folder=run)
    for name in ("record", "frontiers", "timing"):
        expected = f"0123/.*: expected .*; remove the folder {run}, and the same command does this"
        with pytest.raises(CheckpointError, match=expected):
            getattr(done, name)


def test_two_processes_on_one_study_are_refused(tmp_path):
    out = tmp_path / "study"
    with go_on_or_claim(out, {"study": "tiny"}):
        refused = pytest.raises(CheckpointError, match="no other process writes to")
        with refused, go_on_or_claim(out, {"study": "tiny"}):
            pass


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
        ConfigError, match=r"recipe 'late', 640 training tokens a run: backbone_steps"
    ):
        run_study(late, config, out, watcher=Watcher(), workers=workers)
    path.write_text("too few")
    with pytest.raises(CorpusError, match="expected at least 65 tokens to train on"):
        run_study(tiny, config, out, watcher=Watcher(), workers=workers)
    assert not out.exists()
