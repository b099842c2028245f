"""A tokenizer whose ids have a hole: a new model is large enough, and another one is refused."""

import json
import shutil

import pytest

from offramp.data import make_tokenizer, vocabulary_size


@pytest.fixture
def holed(checkpoint, tmp_path):
    """The checkpoint's tokenizer with its last token moved away to id 400."""
    stored = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 400
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    return tmp_path / "tokenizer.json"


def test_a_model_is_trained_that_knows_the_largest_id(offramp, checkpoint, holed, tmp_path):
    tokenizer = make_tokenizer(str(holed), "")
    assert tokenizer.get_vocab_size() < 400
    assert vocabulary_size(tokenizer) == 401
    result = offramp(
        *("train", "--corpus", checkpoint / "text.txt", "--tokenizer", holed, "--layers", 2),
        *("--dim", 8, "--heads", 2, "--exits", 1, "--steps", 2, "--seq-len", 16),
        *("--batch-size", 2, "--tracker", "none", "--out", tmp_path / "model"),
    )
    assert result.returncode == 0, result.stderr
    assert (
        json.loads((tmp_path / "model" / "config.json").read_text())["model"]["vocab_size"] == 401
    )
    for arguments in (("sweep", tmp_path / "model", "--corpus", checkpoint / "text.txt"),):
        result = offramp(*arguments)
        assert result.returncode == 0, result.stderr


def test_a_model_without_the_largest_id_is_refused_in_one_sentence(
    offramp, checkpoint, holed, tmp_path
):
    folder, text = tmp_path / "small", checkpoint / "text.txt"
    shutil.copytree(checkpoint, folder)
    shutil.copyfile(holed, folder / "tokenizer.json")
    for arguments in (
        ("probe", folder, "--corpus", text),
        ("sweep", folder, "--corpus", text),
        ("tune", folder, "--corpus", text, "--exits", 2, "--out", tmp_path / "tuned"),
        ("generate", folder, "7 quick"),
    ):
        result = offramp(*arguments)
        assert result.returncode == 2
        assert "the size of the model's vocabulary, got ids up to 400" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
