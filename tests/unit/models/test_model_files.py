"""Where a model's files are, and the hash of what counts in them."""

import json
import shutil

import pytest

from offramp.errors import CheckpointError
from offramp.exits.gate import FittedExits, Gate
from offramp.models.model_files import UNFINISHED, find_model, state_sha256
from offramp.models.open import open_model


def test_the_hash_knows_weights_config_tokenizer_and_gates(tmp_path):
    contents = {"config.json": "{}", "model.safetensors": "w", "tokenizer.json": "t"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    first = find_model(tmp_path).sha256
    (tmp_path / "certificate.json").write_text("a file beside them does not count")
    assert find_model(tmp_path).sha256 == first
    seen = {first}
    (tmp_path / "exits.safetensors").write_text("gates")
    seen.add(find_model(tmp_path).sha256)
    for name in contents:
        (tmp_path / name).write_text("{ }")
        seen.add(find_model(tmp_path).sha256)
    assert len(seen) == 5


@pytest.fixture
def tuned(checkpoint, tmp_path):
    """A folder of exits beside a copy of a checkpoint."""
    from offramp import from_pretrained, save_exits

    base, out = tmp_path / "base", tmp_path / "exits"
    shutil.copytree(checkpoint, base)
    model = from_pretrained(base, exit_layers=(2,), exit_head="norm")
    model.freeze_backbone()
    save_exits(model, out, trained={"corpus": {"sha256": "text"}})
    return base, out


def test_exits_are_hashed_with_the_backbone_that_they_stand_on(tuned, tmp_path):
    base, out = tuned
    first = find_model(out).sha256
    assert find_model(base).sha256 != first
    moved = tmp_path / "moved"
    base.rename(moved)
    content = json.loads((out / "offramp.json").read_text())
    content["base"]["id"] = str(moved)
    (out / "offramp.json").write_text(json.dumps(content))
    assert find_model(out).sha256 == first  # content counts, not places
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert find_model(out).sha256 != first
    (moved / "config.json").write_text(json.dumps(config))
    tokenizer = (moved / "tokenizer.json").read_text()
    (moved / "tokenizer.json").write_text(tokenizer + " ")
    assert find_model(out).sha256 != first


def test_the_record_names_what_the_exits_were_trained_on(tuned):
    assert find_model(tuned[1]).record.corpora == {"text"}
    assert find_model(tuned[0]).record.corpora == frozenset()


def test_an_unfinished_run_without_a_model_is_named_with_the_command_that_continues_it(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / UNFINISHED).write_text("{}")
    with pytest.raises(CheckpointError, match=f"my run: .* offramp train --resume '{folder}'"):
        find_model(folder)


def test_a_model_in_memory_is_hashed_by_its_parameters_tokenizer_and_gates(checkpoint):
    opened = open_model(checkpoint)
    gate = Gate(32)
    seen = []
    for change in (lambda: None, lambda: opened.model.lm_head.weight.data.add_(1)):
        change()
        for fitted in (FittedExits(), FittedExits(gates={"gain": {1: gate}})):
            seen.append(state_sha256(opened.model, opened.tokenizer, fitted))
            assert state_sha256(opened.model, opened.tokenizer, fitted) == seen[-1]
    gate.out_proj.bias.data.add_(1)
    seen.append(state_sha256(opened.model, opened.tokenizer, fitted))
    assert len(set(seen)) == 5
