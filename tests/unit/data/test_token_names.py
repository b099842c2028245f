"""``--stop-token 2`` is id 2; tokens as people write them are found where they are one token."""

import pytest
from tokenizers import Tokenizer, decoders, models

from offramp.data import character_tokenizer, make_tokenizer
from offramp.data.token_names import token_id
from offramp.errors import ConfigError

PROSE = "salt and pepper and 2 eggs and\n\tmore and more of it, 22 in all\n" * 20
BPE = make_tokenizer("bpe:280", PROSE)
BPE.add_special_tokens(["<|im_end|>"])
SPM = Tokenizer(
    models.BPE({"<unk>": 0, "<0x0A>": 1, "\u2581and": 2, "and": 3, "2": 4}, [], unk_token="<unk>")
)
SPM.decoder = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
)


def text_of(tokenizer, written):
    return tokenizer.decode(
        [token_id(tokenizer, written, tokenizer.get_vocab_size())], skip_special_tokens=False
    )


@pytest.mark.parametrize("id", [0, 2, 13, 280])
def test_digits_are_an_id(id):
    assert token_id(BPE, str(id), 281) == id


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("text:2", "2"),
        ("\n", "\n"),
        ("\\n", "\n"),
        ("\\t", "\t"),
        ("\\x09", "\t"),
        ("\\u000a", "\n"),
        ("\\\\", "\\"),
        (" and", " and"),
        ("\u0120and", " and"),
        ("<|im_end|>", "<|im_end|>"),
        ("text:<|im_end|>", "<|im_end|>"),
    ],
)
def test_a_byte_level_token_is_named_by_its_text_or_spelling(written, text):
    assert text_of(BPE, written) == text


@pytest.mark.parametrize(("written", "id"), [("<0x0A>", 1), ("\n", 1), (" and", 2), ("and", 3)])
def test_a_sentencepiece_token_is_named_by_its_text_or_spelling(written, id):
    assert token_id(SPM, written, 5) == id


def test_characters_are_named_by_themselves():
    assert text_of(character_tokenizer("ab\n\u0120"), "\\n") == "\n"
    with pytest.raises(ConfigError):  # that letter is not the line break
        token_id(character_tokenizer("ab\u010a"), "\n", 4)


@pytest.mark.parametrize(
    "written",
    ["", "text:", "and pepper", "281", "9999", "9" * 5000, "-1", "\u00b2", "\u0663", "\\ud800"],
)
def test_what_is_not_one_token_is_one_sentence(written):
    with pytest.raises(ConfigError, match=r"^stop_token: expected a token") as error:
        token_id(BPE, written, 281)
    assert len(str(error.value)) < 250


def test_an_unknown_character_is_not_the_unknown_token():
    with pytest.raises(ConfigError):
        token_id(character_tokenizer("ab"), "z", 3)
    assert token_id(character_tokenizer("ab"), "<unk>", 3) == 0
