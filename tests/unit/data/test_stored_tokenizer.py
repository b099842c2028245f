import json
import time

import pytest
from tokenizers import Tokenizer, processors

from offramp.data import encode, make_tokenizer
from offramp.errors import CorpusError

PROSE = "the quick brown fox jumps over the lazy dog while the other dogs sleep on\n" * 20
BPE = make_tokenizer("bpe:280", PROSE)


def test_a_stored_tokenizer_is_read_from_its_file_or_folder(tmp_path):
    stored = BPE
    stored.save(str(tmp_path / "tokenizer.json"))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        assert make_tokenizer(str(spec), "unused").to_str() == stored.to_str()


def test_what_a_file_asks_for_a_models_inputs_is_left_out(tmp_path):
    tokenizer = Tokenizer.from_str(BPE.to_str())
    plain = encode(tokenizer, PROSE).tolist()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=12)
    tokenizer.post_processor = processors.BertProcessing(("a", 0), ("a", 0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode(PROSE).ids) == 12
    assert encode(make_tokenizer(str(tmp_path), ""), PROSE).tolist() == plain


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none.json", "no such file"),
        ("./none", "no such file"),
        ("empty", "no such file"),
        ("broken.json", "of the tokenizers library, got"),
        ("no-such-model", "the hub cannot be reached"),
        ("", "expected characters, bytes, bpe:N"),
        ("Characters", "expected characters, bytes, bpe:N"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_a_corpus_error(spec, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text(json.dumps({"model": 3}))
    start = time.perf_counter()
    with pytest.raises(CorpusError, match=message) as caught:
        make_tokenizer(spec, PROSE)
    assert time.perf_counter() - start < 5
    assert "\n" not in str(caught.value)
