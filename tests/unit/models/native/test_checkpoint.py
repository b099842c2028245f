import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp.errors import CheckpointError
from offramp.files import write_json
from offramp.models.native import checkpoint
from offramp.models.native.checkpoint import load_checkpoint, save_checkpoint
from offramp.reading import read_json


def save(model, folder, **about):
    save_checkpoint(model, folder, about=about, weights_about={"step": "7"})


@pytest.fixture
def folder(make_model, tmp_path):
    save(make_model(dtype=torch.float32), tmp_path, tokenizer="characters")
    return tmp_path


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"exit_head": "norm", "exit_layers": (1, 2)},
        {"exit_head": "full", "exit_layers": (2,), "tie_word_embeddings": True},
        {"norm": "post", "num_key_value_heads": 2, "rope_theta": 500.0},
        {"kv_source_layer": 1, "exit_head": "norm"},
        {"kv_source_layer": 1, "norm": "post", "num_key_value_heads": 2},
    ],
    ids=[
        *("plain", "tied", "norm heads", "full heads and tied", "post-norm and gqa"),
        *("source", "source and post-norm"),
    ],
)
def test_a_model_comes_back_bit_for_bit(make_model, make_ids, tmp_path, fields):
    model = make_model(dtype=torch.float32, **fields)
    save(model, tmp_path, corpus="pangram")
    back, about = load_checkpoint(tmp_path)
    assert back.config == model.config
    assert about["corpus"] == "pangram"
    assert not back.training
    expected = model.state_dict()
    assert list(back.state_dict()) == list(expected)
    for name, value in back.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for logits, wanted in zip(
        back.forward_all_layers(make_ids(2, 5)),
        model.forward_all_layers(make_ids(2, 5)),
        strict=True,
    ):
        assert torch.equal(logits, wanted)
    tied = back.lm_head.weight is back.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_say_where_they_come_from(folder):
    assert checkpoint.weights_about(folder)["step"] == "7"


def test_the_wanted_dtype_is_given(folder):
    model, _ = load_checkpoint(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("harm", "names"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "config.json").write_text(""), "config.json"),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
        (lambda f: (f / "config.json").write_text("null"), "config.json"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" * 9), "model.safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 5), "model.safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 900), "model.safetensors"),
        (
            lambda f: os.truncate(
                f / "model.safetensors", (f / "model.safetensors").stat().st_size - 1
            ),
            "model.safetensors",
        ),
        (lambda f: save_file({}, f / "model.safetensors"), "model.safetensors"),
    ],
)
def test_a_damaged_folder_is_an_error_that_names_the_file(folder, harm, names):
    harm(folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert str(folder / names) in str(caught.value)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match="none-here: expected a model folder"):
        load_checkpoint(tmp_path / "none-here")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(format=2),
        lambda c: c.pop("format"),
        lambda c: c.pop("model"),
        lambda c: c.update(model="transformer"),
        lambda c: c["model"].pop("vocab_size"),
        lambda c: c["model"].pop("exit_layers"),
        lambda c: c["model"].update(exit_layers=3),
        lambda c: c["model"].update(exit_layers=["first"]),
        lambda c: c["model"].update(exit_layers=[9]),
        lambda c: c["model"].update(dropout=0.1),
        lambda c: c["model"].update(hidden_size=0),
        lambda c: c["model"].update(hidden_size="wide"),
        lambda c: c["model"].update(hidden_size=None),
        lambda c: c["model"].update(vocab_size=13.5),
        lambda c: c["model"].update(norm="layer"),
    ],
)
def test_a_wrong_config_is_an_error_that_names_it(folder, change):
    change_config(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_wrong_types_are_the_same_error_where_nothing_checks_types(folder):
    """In tests beartype is first to complain; a user has no beartype."""
    code = """
import json, sys
from pathlib import Path
from offramp import CheckpointError, load_checkpoint
folder = Path(sys.argv[1])
good = json.loads((folder / "config.json").read_text())
for name, value in [("vocab_size", 13.5), ("hidden_size", 16.0), ("rope_theta", "x"),
                    ("max_position_embeddings", -1), ("num_hidden_layers", 3.0)]:
    config = {**good, "model": {**good["model"], name: value}}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        load_checkpoint(folder)
    except CheckpointError as error:
        assert str(folder / "config.json") in str(error)
    else:
        sys.exit(f"{name} = {value!r} was loaded")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": 32},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"vocab_size": 14},
        {"exit_head": "norm"},
        {"norm": "post"},
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_names_them(folder, changed):
    change_config(folder, lambda c: c["model"].update({**changed, "exit_layers": [1]}))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert f"{folder / 'model.safetensors'}: the weights do not fit" in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_a_missing_embedding_is_an_error(make_model, tmp_path, tied):
    save(make_model(dtype=torch.float32, tie_word_embeddings=tied), tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    assert ("lm_head.weight" in weights) != tied
    del weights["model.embed_tokens.weight"]
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"embed_tokens"):
        load_checkpoint(tmp_path)


def test_a_write_that_fails_half_way_leaves_the_old_files(make_model, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(state, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(CheckpointError, match="cannot be written: disk full"):
        save(make_model(dtype=torch.float32, seed=1), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_infinity_is_written_as_a_word(tmp_path):
    write_json(tmp_path / "a.json", {"rows": [(float("inf"), -float("inf"), 1.5)], 3: 1})
    assert read_json(tmp_path / "a.json") == {"rows": [["inf", "-inf", 1.5]], "3": 1}


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"ppl": 1.5, "word": "\u00e9"})
    assert read_json(path) == {"ppl": 1.5, "word": "\u00e9"}
    for content in ({"ppl": float("nan")}, {"ppl": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, content)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    write_text = Path.write_text

    def fail(self, text, **kwargs):
        write_text(self, text[: len(text) // 2], **kwargs)
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(CheckpointError, match="cannot be written: disk full"):
        write_json(path, {"ppl": 2.5})
    assert read_json(path) == {"ppl": 1.5, "word": "\u00e9"}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_new_file_takes_the_name_and_the_old_one_is_not_written_into(tmp_path):
    """So whoever has the old file open (or linked) still reads it whole."""
    write_json(tmp_path / "a.json", [1])
    (tmp_path / "link.json").hardlink_to(tmp_path / "a.json")
    write_json(tmp_path / "a.json", [2])
    assert (read_json(tmp_path / "link.json"), read_json(tmp_path / "a.json")) == ([1], [2])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("2", "kv_source_layer: expected a whole number or None, got '2'"),
        (2.0, "kv_source_layer: expected a whole number or None, got 2.0"),
        (True, "kv_source_layer: expected a whole number or None, got True"),
        ([2], "kv_source_layer: expected a whole number or None, got [2]"),
        (-1, "kv_source_layer: expected from 1 to 4, below the last layer, got -1"),
        (0, "kv_source_layer: expected from 1 to 4, below the last layer, got 0"),
        (5, "kv_source_layer: expected from 1 to 4, below the last layer, got 5"),
        (10**30, f"kv_source_layer: expected a number below 2^63, got {10**30}"),
        (1, 'Unexpected key(s) in state_dict: "model.layers.2.self_attn.k_proj.weight"'),
        (3, 'Missing key(s) in state_dict: "model.layers.3.self_attn.k_proj.weight"'),
        (None, 'Missing key(s) in state_dict: "model.layers.3.self_attn.k_proj.weight"'),
    ],
)
def test_a_source_that_does_not_fit_is_one_sentence(make_model, tmp_path, value, said):
    save(make_model(dtype=torch.float32, num_hidden_layers=5, kv_source_layer=2), tmp_path)
    change_config(tmp_path, lambda config: config["model"].update(kv_source_layer=value))
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(tmp_path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_without_a_source_is_stored_as_before(make_model, tmp_path):
    save(make_model(dtype=torch.float32), tmp_path)
    assert "kv_source_layer" not in read_json(tmp_path / "config.json")["model"]
    assert load_checkpoint(tmp_path)[0].config.kv_source_layer is None


def test_a_source_in_a_model_that_has_no_block_above_it_is_refused(folder):
    change_config(
        folder,
        lambda config: config["model"].update(
            num_hidden_layers=1, exit_layers=[1], kv_source_layer=1
        ),
    )
    with pytest.raises(CheckpointError, match="kv_source_layer: expected none in a model of one"):
        load_checkpoint(folder)
