"""A tokenizer with an absurd largest id is refused in a sentence, before a model is made for it."""

import json

import pytest
from tokenizers import Tokenizer

import offramp
from offramp.data.tokenizer import byte_tokenizer
from offramp.data.vocabulary import MOST_UNUSED, vocabulary_size
from offramp.errors import CorpusError


def with_id(id):
    stored = json.loads(byte_tokenizer().to_str())
    stored["model"]["vocab"]["far"] = id
    return json.dumps(stored)


def test_unused_ids_count_as_rows_of_the_embedding():
    assert vocabulary_size(byte_tokenizer()) == 256
    assert vocabulary_size(Tokenizer.from_str(with_id(256 + MOST_UNUSED))) == 257 + MOST_UNUSED


@pytest.mark.parametrize("id", [257 + MOST_UNUSED, 10**9, 2**31])
def test_a_tokenizer_with_an_absurd_id_is_refused_in_a_sentence(id, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(with_id(id))
    text = tmp_path / "text.txt"
    text.write_text("a text " * 100)
    with pytest.raises(CorpusError, match=f"257 tokens with ids up to {id}"):
        offramp.train(
            text, layers=1, dim=16, heads=1, exits=[], tokenizer=str(path), out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
