import pytest

from offramp.data.tokenizer import byte_tokenizer, character_tokenizer
from offramp.generation.text import TextStream


def pieces(text, *stops, tokenizer=None):
    tokenizer = tokenizer or byte_tokenizer()
    stream = TextStream(tokenizer, stops)
    out = []
    for token in tokenizer.encode(text).ids:
        out.append(stream.push(token))
        if stream.stopped:
            return out
    return [*out, stream.flush()]


@pytest.mark.parametrize("text", ["plain", "äöü €uro 🙂🙂!", "a\n\n b", "🏳️‍🌈"])
def test_the_pieces_are_the_text_and_no_character_is_cut(text):
    out = pieces(text)
    assert "".join(out) == text
    assert not any("\ufffd" in piece for piece in out)


def test_characters_come_at_once():
    tokenizer = character_tokenizer("abc ")
    assert pieces("ab c", tokenizer=tokenizer)[:4] == ["a", "b", " ", "c"]


def test_bytes_that_never_become_a_character_come_in_the_end():
    stream = TextStream(byte_tokenizer())
    assert [stream.push(byte) for byte in (97, 0xF0, 0x9F)] == ["a", "", ""]
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one. two", [". "], "one"),
        ("a<b<end>c", ["<end>"], "a<b"),
        ("a<en", ["<end>"], "a<en"),
        ("ababac", ["abac"], "ab"),
        ("xyz", ["z", "yz"], "x"),
        ("stop", ["stop"], ""),
    ],
)
def test_text_ends_before_a_stop_string(text, stops, expected):
    out = pieces(text, *stops)
    assert "".join(out) == expected


def test_a_beginning_of_a_stop_string_is_held_back():
    assert pieces("a<b", "<end>") == ["a", "", "<b", ""]


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None)
    assert (stream.push(5), stream.flush()) == ("", "")
