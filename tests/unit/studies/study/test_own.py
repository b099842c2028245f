"""Studies of one's own: a grid of fields from a TOML file."""

import json
from dataclasses import replace

import pytest

from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.cli import main
from offramp.errors import CheckpointError, ConfigError
from offramp.making import study
from offramp.studies.study.chosen import chosen_study
from offramp.studies.study.grid import check_runs, plan_runs
from offramp.studies.study.grid_file import GridFile, read_grid
from offramp.studies.study.own import study_of_grid
from offramp.studies.study.run import StudyText
from offramp.studies.study.studies import GRID, SMALL
from offramp.training.config import TrainConfig

ABOUT = {"corpus": "text.txt", "sha256": "0", "test_sha256": "1"}
TEXT = StudyText(train="the quick fox " * 400, held_out="fox " * 50, test="the " * 50, about=ABOUT)
TINY = """
question = "Which alpha and which exit are best on my text?"
seeds = 2
tokens = 1024
test_tokens = 256
static_layers = [1, 3]
measures = ["max_prob"]
baseline = {loss_weights = "asymmetric:0.5", exit_layers = [1]}

[model]
num_hidden_layers = 3
hidden_size = 16
num_attention_heads = 2
exit_layers = [[1], [2]]

[training]
loss_weights = ["asymmetric:0.3", "asymmetric:0.5"]
batch_size = 8
seq_len = 16
"""


def code_of(*words):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def of(**content):
    return study_of_grid(GridFile(**content))


def test_varied_fields_multiply(tmp_path):
    (path := tmp_path / "mine.toml").write_text(TINY)
    found = chosen_study(path)
    assert found == chosen_study(str(path))
    assert [recipe.label for recipe in found.recipes] == [
        f"exit_layers {layer}, loss_weights asymmetric:{alpha}"
        for layer in (1, 2)
        for alpha in (0.3, 0.5)
    ]
    assert found.baseline == "exit_layers 1, loss_weights asymmetric:0.5"
    runs = plan_runs(found, TEXT)
    assert len(runs) == 2 * (2 + 4)
    assert {run.tokens for run in runs} == {1024}
    assert {run.training.seed for run in runs} == {0, 1}
    last = runs[-1]
    assert last.model.exit_layers == (2, 3)
    assert last.training.loss_weights == "asymmetric:0.5"
    static = [run for run in runs if len(run.model.exit_layers) == 1]
    assert {run.training.loss_weights for run in static} == {"standard"}
    assert {run.model.num_hidden_layers for run in static} == {1, 3}
    assert {run.model.hidden_size for run in runs} == {16}


def test_without_fields_it_is_the_small_model_with_one_exit_and_the_default_objective():
    found = of()
    assert replace(found.model, exit_layers=SMALL.exit_layers) == SMALL
    assert found.training == GRID.training
    assert [recipe.label for recipe in found.recipes] == ["recipe"]
    (run,) = [run for run in plan_runs(found, TEXT) if run.label == "recipe"][:1]
    assert run.model == SMALL
    assert run.training.loss_weights == TrainConfig.loss_weights
    assert found.static_layers == (1, 2, 3, 4, 5, 6)


def test_a_run_is_that_of_a_built_in_study_with_the_same_values():
    mine = of(
        model={"exit_layers": [2]},
        training={"loss_weights": "2=0.5,6=0.5"},
        measures=("gain", "max_prob"),
    )
    theirs = chosen_study("heads")
    name = next(run.name for run in plan_runs(theirs, TEXT) if run.label == "norm")
    assert name in {run.name for run in plan_runs(mine, TEXT)}


def test_one_varied_number_is_what_the_trend_is_over():
    alphas = [f"asymmetric:{alpha}" for alpha in (0.1, 0.5, 0.9)]
    found = of(training={"loss_weights": alphas})
    assert found.varies == "the number of asymmetric"
    assert [recipe.level for recipe in found.recipes] == [0.1, 0.5, 0.9]
    found = of(training={"distill": [0, 0.5, 1]})
    assert (found.varies, found.recipes[1].level) == ("distill", 0.5)
    assert found.recipes[0].label == "distill 0"
    for training in (
        {"loss_weights": [*alphas, "free"]},
        {"loss_weights": alphas, "lr": [1e-3, 2e-3]},
        {"distill": [0, 1]},
    ):
        assert of(training=training).varies is None


def test_none_specialised_exits_and_sources():
    found = of(
        model={"kv_source_layer": ["none", 1, 2], "exit_layers": [1, 2]},
        specialise={"compute_budget": [55, 60.0], "add_exits": [3]},
        decoding=True,
    )
    assert [recipe.label for recipe in found.recipes][:2] == [
        "kv_source_layer none, compute_budget 55",
        "kv_source_layer none, compute_budget 60",
    ]
    assert "kv_source_layer" not in found.recipes[0].model
    assert found.recipes[2].model["kv_source_layer"] == 1
    assert found.shared_static == ((6, 1), (6, 2))
    assert found.recipes[0].specialise == SpecialiseConfig(compute_budget=55.0, add_exits=(3,))
    check_runs(plan_runs(replace(found, tokens=4096), replace(TEXT, train="ab c" * 9000)))


def test_numbers_that_are_close_have_labels_of_their_own():
    found = of(training={"lr": [0.00123456789, 0.0012345679, 0.5]})
    assert [recipe.label for recipe in found.recipes] == [
        "lr 0.00123456789",
        "lr 0.0012345679",
        "lr 0.5",
    ]


@pytest.mark.parametrize(
    ("specialise", "message"),
    [
        ({"compute_budget": 10}, r"recipe 'recipe', .* compute_budget: expected at least 36.7"),
        (
            {"add_exits": [9]},
            r"recipe .recipe., .* add_exits: expected layers from 1 to 5 without an",
        ),
    ],
)
def test_exits_that_cannot_be_specialised_are_refused_before_anything_is_trained(
    specialise, message
):
    text = replace(TEXT, train="ab c" * 9000)
    with pytest.raises(ConfigError, match=message):
        check_runs(plan_runs(of(specialise=specialise, tokens=4096), text))


def test_static_models_have_the_first_value_and_each_run_the_same_tokens():
    found = of(training={"lr": [3e-3, 1e-3], "batch_size": [4, 8]}, tokens=4096)
    runs = plan_runs(found, TEXT)
    static = {(run.training.lr, run.training.batch_size) for run in runs if "static" in run.label}
    assert static == {(3e-3, 4)}
    assert {(run.training.batch_size, run.training.steps) for run in runs} == {(4, 8), (8, 4)}
    with pytest.raises(ConfigError, match="tokens: expected a number that is a multiple of"):
        plan_runs(replace(found, tokens=4097), TEXT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sedes = 3", "sedes: expected no such field"),
        ("seeds = 0", "seeds: expected at least 1, got 0"),
        ("seeds = 'three'", "seeds: expected a whole number, got 'three'"),
        ("name = ''", "name: expected text on one line, got ''"),
        ('question = """a\nb"""', "question: expected text on one line, got"),
        ("tokens = 2024-01-01", "tokens: expected a whole number"),
        ("[training]\nlr = nan", "lr: expected a number, got nan"),
        ("compared_at = 0", "compared_at: expected a share"),
        ("measures = []", "measures: expected different confidence measures, got"),
        ("measures = ['maxprob']", "measures: expected some of max_prob, margin, .*, got 'maxpro"),
        ("static_layers = [2, 3]", r"static_layers: expected layers from 1 to 6, with 6, got"),
        ("static_layers = [0, 6]", r"static_layers: expected layers from 1 to 6, with 6, got"),
        ("[model]\nwidth = 3", r"\[model\]: expected fields of it, got 'width', no such field"),
        ("[model]\nvocab_size = 3", "got 'vocab_size', which the study sets"),
        ("[training]\nsteps = 3", "got 'steps', which the study sets"),
        ("[training]\nseed = [1, 2]", "got 'seed', which the study sets"),
        ("[training]\nlr = []", r"training.lr: expected different values, got \[\]"),
        ("[training]\nlr = [1, 1.0]", "training.lr: expected different values"),
        ("[training]\nlr = [[1]]", "training.lr: expected values, got"),
        ("[training]\nlr = ['x', 1]", r"recipe|\[training\] lr: expected a number, got 'x'"),
        ("[training]\nlr = -1", r"\[training\] lr: expected"),
        ("[model]\nexit_layers = [[1], [9]]", "recipe exit_layers 9: .*layers from 1 to 6, got 9"),
        ("[model]\nkv_source_layer = 6", r"\[model\] kv_source_layer: expected from 1 to 5"),
        ("[model]\nhidden_size = 30", r"\[model\] hidden_size: expected a multiple of 2 x 4"),
        ("[model]\nexit_layers = []", r"exit_layers: expected a layer before the last, got \[\]"),
        ("[model]\nexit_layers = [[1], [6]]", r"recipe exit_layers 6: .*the last, got \[6\]"),
        ("[model]\nnum_hidden_layers = 1", "expected a layer before the last, got"),
        ("[model]\nnum_hidden_layers = [4, 'x']", "recipe num_hidden_layers x: .*number, got 'x'"),
        ("[training]\nlr = {a = 1}", r"\[training\] lr: expected a number, got {'a': 1}"),
        ("[specialise]\ncompute_budget = 0.5\nadd_exits=[0]", "add_exits: expected layers of at"),
        ("[baseline]\nlr = 1", "baseline: expected varied fields .none, since nothing is varied"),
        ("baseline.lr = 3\n[training]\nlr = [1, 2]", "baseline: expected values of one recipe, go"),
        ("[training]\nlr = [1, 2]\n[model]\nnorm=['pre', 'post']\n[baseline]\nlr=1", "those of 2"),
        (
            f"[training]\nlr = {list(range(1, 102))}\nweight_decay = {list(range(1, 12))}",
            "expected at most 1,000 recipes, got 1,111",
        ),
        ("[training", "expected TOML, got"),
        ("x = 1\x00", "expected TOML, got"),
    ],
)
def test_a_bad_grid_is_one_sentence_that_names_the_file(tmp_path, content, message, capsys):
    (path := tmp_path / "mine.toml").write_text(content)
    with pytest.raises((ConfigError, CheckpointError), match=message) as raised:
        chosen_study(path)
    assert str(raised.value).startswith(str(path))
    text = tmp_path / "text.txt"
    text.write_text("the quick fox " * 200)
    out = tmp_path / "out"
    assert code_of("study", "--grid", path, "--corpus", text, "--out", out) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not out.exists()


def test_a_study_needs_a_name_or_a_grid(tmp_path, capsys):
    line = ["--corpus", "pangram", "--out", str(tmp_path / "out")]
    for words, got in ((["study"], "neither"), (["study", "alpha", "--grid", "x.toml"], "both")):
        assert code_of(*words, *line) == 2
        assert f"expected the name of a study or --grid, got {got}" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="expected a file, found none"):
        read_grid(tmp_path / "none.toml")


@pytest.mark.slow
def test_a_grid_from_the_command_line_and_from_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(TINY)
    (tmp_path / "text.txt").write_text("".join(f"{n} quick foxes jump. " for n in range(900)))
    about = ["--corpus", "text.txt", "--runs", "runs", "--jobs", "1"]
    line = ["study", "--grid", "mine.toml", *about, "--out"]
    assert not main([*line, "out"])
    said = capsys.readouterr()
    assert "12 runs, 12,288 training tokens in all" in said.err
    result = json.loads((tmp_path / "out" / "study.json").read_text())
    assert result["study"] == "grid"
    assert "my text?" in (tmp_path / "out" / "report.html").read_text()
    labels = {row["label"] for row in result["summary"]}
    assert labels == {
        f"exit_layers {layer}, loss_weights asymmetric:{alpha}"
        for layer in (1, 2)
        for alpha in (0.3, 0.5)
    }
    content = {
        "question": "Which alpha and which exit are best on my text?",
        **{"seeds": 2, "tokens": 1024, "test_tokens": 256, "measures": ["max_prob"]},
        "static_layers": [1, 3],
        "baseline": {"loss_weights": "asymmetric:0.5", "exit_layers": [1]},
        "model": {
            **{"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2},
            "exit_layers": [[1], [2]],
        },
        "training": {
            "loss_weights": ["asymmetric:0.3", "asymmetric:0.5"],
            **{"batch_size": 8, "seq_len": 16},
        },
    }
    table = study(content, "text.txt", out="again", runs="runs", jobs=1)
    assert (tmp_path / "again" / "study.json").read_bytes() == (
        tmp_path / "out" / "study.json"
    ).read_bytes()
    assert len(table.rows) == 8
    (tmp_path / "mine.toml").write_text(TINY.replace("asymmetric:0.3", "asymmetric:0.4"))
    assert code_of(*line, "out") == 2
    assert "but grid differ" in capsys.readouterr().err
