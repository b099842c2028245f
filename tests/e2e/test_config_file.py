"""``offramp train --config FILE``."""

import json

import pytest

from offramp.models.native.checkpoint import load_checkpoint

SETTINGS = {
    "corpus": "pangram",
    "dim": 16,
    "heads": 2,
    "layers": 3,
    "exits": [1, 2],
    "lr": 1,  # a whole number for a float
    "loss_weights": "asymmetric:0.5",
    "steps": 2,
    "seq-len": 8,
    "batch_size": 2,
    "shuffle": False,
}


def written(folder, settings, *, toml):
    path = folder / ("run.toml" if toml else "run.json")
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    path.write_text("\n".join(lines) if toml else json.dumps(settings))
    return path


@pytest.mark.parametrize("toml", [True, False])
def test_a_file_gives_the_flags_and_the_command_line_wins(offramp, tmp_path, toml):
    path = written(tmp_path, SETTINGS, toml=toml)
    out = tmp_path / "model"
    result = offramp("train", "--config", path, "--layers", 4, "--out", out)
    assert result.returncode == 0, result.stderr
    model, about = load_checkpoint(out)
    assert (model.num_layers, model.config.hidden_size) == (4, 16)
    assert model.exit_layers == (1, 2, 4)
    training = about["training"]
    assert (training["lr"], training["shuffle"]) == (1.0, False)
    assert training["loss_weights"] == "asymmetric:0.5"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dmi": 32, "colour": 1}, ("colour", "dmi")),
        ({"resume": "x"}, ("resume",)),
        ({"train": {}}, ("train",)),
        ({"epochs": 2}, ("steps", "epochs", "both")),
        ({"alpha_end": 0.1}, ("alpha_end", "alpha_schedule")),
        ({"detach_exits": True, "gradient_equilibrium": True}, ("detach_exits", "both on")),
        ({"loss-weights": "standard"}, ("loss-weights once",)),
        ({"loss_weights": "5=1"}, ("layers from 1 to 3", "got 5")),
        ({"dim": "wide"}, ("dim", "wide")),
        ({"heads": 3}, ("heads", "16", "3")),
    ],
)
def test_a_wrong_file_is_one_sentence(offramp, tmp_path, change, named):
    path = written(tmp_path, SETTINGS | change, toml=False)
    out = tmp_path / "model"
    result = offramp("train", "--config", path, "--out", out)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    for word in named:
        assert word in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("text", ["dim = ", "dim = 1\ndim = 2"])
def test_a_file_that_is_no_toml_is_named(offramp, tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    result = offramp("train", "--config", path, "--out", tmp_path / "model")
    assert result.returncode == 2
    assert str(path) in result.stderr
    missing = offramp("train", "--config", tmp_path / "none.toml", "--out", tmp_path / "model")
    assert missing.returncode == 2
    assert "none.toml" in missing.stderr
