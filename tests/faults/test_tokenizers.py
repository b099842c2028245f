"""A tokenizer at which the tokenizers library fails or panics in Rust is a sentence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from offramp.data.tokenizer import encode, encode_prompt, make_tokenizer
from offramp.data.tokenizer_errors import decode
from offramp.errors import CorpusError

NO_TOKEN = {  # a panic: the special token is not in the list
    "type": "TemplateProcessing",
    "single": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "X", "type_id": 0}},
    ],
    "pair": [],
    "special_tokens": {},
}


def stored(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer.json"
    content = json.loads(make_tokenizer("characters", "some words").to_str())
    path.write_text(json.dumps(content | changes))
    return path


def test_a_panic_is_a_sentence(tmp_path):
    path = stored(tmp_path, post_processor=NO_TOKEN)
    with pytest.raises(CorpusError, match=r"expected one that can encode and decode .*no entry"):
        make_tokenizer(str(path), "")
    tokenizer = Tokenizer.from_file(str(path))
    with pytest.raises(CorpusError, match="expected one that can encode this text"):
        encode_prompt(tokenizer, "words")
    assert len(encode(tokenizer, "words")) == 5


def test_the_library_says_nothing_by_itself(tmp_path):
    path = stored(tmp_path, post_processor=NO_TOKEN)
    command = [sys.executable, "-m", "offramp", "train", "--corpus", "pangram"]
    command += ["--out", str(tmp_path / "out"), "--tokenizer", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"offramp: tokenizer {path}: expected one that can encode")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}}
        for regex in ("(", "[", r"\p{Foo}", r"\k<x>", r"(?<x>\g<x>)", "(" * 3000 + ")" * 3000)
    ]
    + [
        {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
        {"model": {"type": "WordLevel", "vocab": {"a": 2**40}, "unk_token": "a"}},
        {"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
        {"model": None},
        {"added_tokens": 3},
        {"version": "99"},
    ],
)
def test_a_broken_tokenizer_is_a_sentence(tmp_path, changes):
    with pytest.raises(CorpusError, match="expected"):
        make_tokenizer(str(stored(tmp_path, **changes)), "")


def test_a_tokenizer_that_is_cut_off_padded_or_without_an_unknown_token_is_read(tmp_path):
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
    tokenizer = make_tokenizer(str(stored(tmp_path, truncation=cut)), "")
    assert decode(tokenizer, encode_prompt(tokenizer, "some words")) == "some words"
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}
    assert encode_prompt(make_tokenizer(str(stored(tmp_path, model=model)), ""), "aa") == [0, 0]


def test_a_huge_tokenizer_is_refused(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(CorpusError, match="expected at most"):
        make_tokenizer(str(tmp_path), "")
