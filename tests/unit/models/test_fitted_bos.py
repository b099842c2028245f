"""Gates and temperatures record how the texts begin to which they were fitted (BOS or not)."""

import json
import warnings
from dataclasses import replace

import pytest
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer, processors

import offramp
from offramp.cli import main
from offramp.commands.confidence import fit
from offramp.errors import OfframpWarning
from offramp.exits.gate import GateConfig
from offramp.models.fitted import FITTED_FILE
from offramp.models.open import open_model
from offramp.models.save import save_model

FITTED_WITH = "gates and temperatures were fitted with --bos {}, but texts begin with --bos {}"
pytestmark = pytest.mark.filterwarnings("ignore::offramp.models.exit_heads.UntrainedExitsWarning")


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    """Exits of a model whose texts begin with BOS, and gates that were fitted without it."""
    folder = tmp_path_factory.mktemp("fitted")
    lm = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    lm.save_pretrained(folder / "model")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    first = tokenizer.id_to_token(5)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, 5)]
    )
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    text = checkpoint / "text.txt"
    offramp.tune(folder / "model", text, exits=[1], tokens=300, out=folder / "exits")
    opened = open_model(folder / "exits").with_bos("no")
    fit(opened, str(text), max_tokens=256, config=GateConfig(steps=3))
    return folder / "exits"


def opens(folder, bos):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", OfframpWarning)
        lm = offramp.load(folder, bos=bos)
    return lm, [str(each.message) for each in said if each.category is OfframpWarning]


def test_a_fit_records_how_its_texts_begin(tuned):
    with safe_open(tuned / FITTED_FILE, framework="pt") as file:
        assert file.metadata()["bos"] == "no"
    assert open_model(tuned).fitted.bos is False


def test_gates_that_were_fitted_to_texts_with_another_beginning_are_named(tuned, tmp_path):
    assert opens(tuned, "no")[1] == []
    for bos in ("auto", "yes"):
        lm, (said,) = opens(tuned, bos)
        assert FITTED_WITH.format("no", "yes") in said
    lm.save(tmp_path / "copy")  # what is fitted keeps its record
    assert open_model(tmp_path / "copy").fitted.bos is False


def test_commands_name_them_too(tuned, checkpoint, tmp_path, capsys):
    command = ["sweep", str(tuned), "--corpus", str(checkpoint / "text.txt"), "--thresholds", "0.5"]
    main([*command, "--out", str(tmp_path / "yes.json")])
    assert "with --bos no, but" in " ".join(capsys.readouterr().err.split())
    main([*command, "--bos", "no", "--out", str(tmp_path / "no.json")])
    assert "fitted with" not in capsys.readouterr().err
    assert json.loads((tmp_path / "no.json").read_text())["bos"] is False


def test_gates_of_earlier_versions_say_nothing(tuned, tmp_path):
    opened = open_model(tuned)
    assert opened.fitted.bos is False
    save_model(replace(opened, fitted=replace(opened.fitted, bos=None)), tmp_path / "old")
    assert open_model(tmp_path / "old").fitted.bos is None
    assert opens(tmp_path / "old", "yes")[1] == []
