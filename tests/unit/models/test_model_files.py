"""Where a model's files are, and the hash of what counts in them."""

import shutil

import pytest

from offramp.errors import CheckpointError
from offramp.models.model_files import UNFINISHED, find_model


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


def test_the_record_names_what_the_exits_were_trained_on(tuned):
    assert find_model(tuned[1]).record.corpora == {"text"}
    assert find_model(tuned[0]).record.corpora == frozenset()


def test_an_unfinished_run_without_a_model_is_named_with_the_command_that_continues_it(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / UNFINISHED).write_text("{}")
    with pytest.raises(CheckpointError, match=f"my run: .* offramp train --resume '{folder}'"):
        find_model(folder)
