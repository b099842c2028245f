"""Links in a checkpoint: followed when it is read, and never copied from elsewhere."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from offramp.commands.export import export_exit
from offramp.errors import CheckpointError
from offramp.models.open import open_model
from offramp.models.save import save_model

SECRET = "a file of somebody else\n"


@pytest.fixture
def plain(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "plain")


def test_a_snapshot_of_the_hubs_cache_is_opened_and_exported(checkpoint, tmp_path):
    """It is a folder of links to ../../blobs."""
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in checkpoint.iterdir():
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, repository / "blobs" / name)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    assert open_model(snapshot).sha256 == open_model(checkpoint).sha256
    export_exit(snapshot, 2, tmp_path / "out")
    tokenizer = tmp_path / "out" / "tokenizer.json"
    assert not tokenizer.is_symlink()
    assert tokenizer.read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_weights_may_be_links_and_the_hash_is_of_what_they_lead_to(plain, tmp_path):
    expected = open_model(plain).sha256
    (plain / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (plain / "part.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    names = load_file(plain / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_model(plain).sha256 == expected
    other = open_model(plain)
    with torch.no_grad():
        other.model.model.norm.weight.mul_(2)
    save_model(other, tmp_path / "other")
    (plain / "part.safetensors").unlink()
    (plain / "part.safetensors").symlink_to(tmp_path / "other" / "model.safetensors")
    assert open_model(plain).sha256 != expected


@pytest.mark.parametrize("name", ["../plain.safetensors", "/etc/passwd", "a/b.safetensors", "", 5])
def test_an_index_names_files_of_its_own_folder_only(plain, name):
    names = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").rename(plain.parent / "plain.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        open_model(plain)


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.model", "chat_template.jinja"])
def test_export_and_save_copy_no_file_from_elsewhere(plain, tmp_path, name):
    (tmp_path / "secret").write_text(SECRET)
    (plain / name).symlink_to(tmp_path / "secret")
    opened = open_model(plain)
    with pytest.raises(CheckpointError, match=f"{name}: expected a file of the checkpoint to copy"):
        export_exit(plain, 2, tmp_path / "out")
    with torch.no_grad():
        opened.model.model.norm.weight.mul_(2)  # so that the backbone is saved, too
    with pytest.raises(CheckpointError, match=f"{name}: expected a file of the checkpoint to copy"):
        save_model(opened, tmp_path / "saved")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "saved").exists()


def test_a_link_within_the_folder_is_copied_as_a_file(plain, tmp_path):
    (plain / "vocab.txt").write_text("a\nb\n")
    (plain / "vocab-2.txt").symlink_to("vocab.txt")
    export_exit(plain, 2, tmp_path / "out")
    copied = tmp_path / "out" / "vocab-2.txt"
    assert copied.read_text() == "a\nb\n"
    assert not copied.is_symlink()
