"""``offramp specialise`` on exits that ``offramp tune`` trained beside a checkpoint."""

import json

import pytest

from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.commands.specialise import specialise
from offramp.commands.text import read_text
from offramp.commands.tune import open_for_tuning, tune
from offramp.commands.tune_config import TuneConfig
from offramp.errors import CheckpointError
from offramp.models.open import open_model

QUICK = SpecialiseConfig(compute_budget=85, steps=20, tokens=1000, batch_size=128)


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "exits"
    config = TuneConfig(exit_layers=(1, 2), exit_head="full", epochs=1, seq_len=32)
    tune(open_for_tuning(checkpoint, config), str(checkpoint / "text.txt"), out, config)
    return out


@pytest.mark.parametrize("runner", ["transformers", "native"])
def test_tuned_exits_are_specialised_into_a_new_folder(tuned, checkpoint, tmp_path, runner):
    out, text = tmp_path / "special", tmp_path / "other.txt"
    text.write_text((checkpoint / "text.txt").read_text() * 2)  # another corpus
    found = specialise(open_model(tuned, runner=runner), str(text), out, QUICK)
    assert set(found["left"]) == {1, 2, 4}
    assert found["before"][4] == found["after"][4]
    about = json.loads((out / "offramp.json").read_text())
    assert about["trained"]["specialised"]["compute_budget"] == 85
    assert about["trained"]["epochs"] == 1  # how they were tuned before is not forgotten
    assert not (out / "model.safetensors").exists()  # the backbone is not written again
    again = open_model(out)
    assert again.exits_trained
    assert set(again.fitted.gates) == {"gate", "gain"}
    for corpus in (text, checkpoint / "text.txt"):
        assert read_text(again, str(corpus)).seen_in_training


def test_exits_that_were_never_trained_are_refused(checkpoint, tmp_path):
    opened = open_model(checkpoint, exit_layers=(1, 2))
    with pytest.raises(CheckpointError, match=r"expected a model with trained exits"):
        specialise(opened, str(checkpoint / "text.txt"), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()
