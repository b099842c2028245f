import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from offramp.data import UNKNOWN, character_tokenizer, count_unknown, encode, make_tokenizer
from offramp.data import tokenizer as tokenizers_of_offramp
from offramp.data.tokenizer import cut_apart, encode_pieces, encode_prompt
from offramp.errors import ConfigError, CorpusError

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
AWKWARD = [
    "a\nb\r\nc\n\n",
    "\tx\t",
    "\U0001f600 \U00010348",
    "e\u0301\u00e9",
    "  two  ",
    "<unk>",
    "",
    "\x00\u2028\u0120\u010a",
]
WORDS = [
    *("the", "old", "fox's", "12", "dogs", "ran,", "ran", "over", "1984", "lazy\u00e9"),
    *("hills", ";", "'tis", "<unk>", "so", "!"),
]


def prose(characters, *, seed=0):
    """Words, lines as WikiText has them (a space at both ends), empty lines, runs of spaces."""
    random = torch.Generator().manual_seed(seed)
    parts = []
    for number in torch.randint(24, (characters // 3,), generator=random).tolist():
        if number < len(WORDS):
            parts.append(WORDS[number] + " ")
        else:
            parts.append([" \n ", "\n\n\n", "  ", "\n", "\t\n  ", " \n \n = "][number % 6])
    return "".join(parts)[:characters]


PROSE = prose(30_000)
BPE = make_tokenizer("bpe:300", PROSE)


# Characters.


@given(ANY_TEXT)
def test_encoding_and_decoding_give_the_text_back(text):
    tokenizer = character_tokenizer(text)
    ids = encode(tokenizer, text)
    assert ids.dtype == torch.long
    assert len(ids) == len(text)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert count_unknown(tokenizer, ids) == 0


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_characters_come_back(text):
    tokenizer = character_tokenizer(text + "xyz")
    ids = encode(tokenizer, text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_a_long_text_is_encoded_without_seams():
    text = "".join(chr(33 + i * i % 90) for i in range(10_000))
    tokenizer = character_tokenizer(text)
    ids = encode(tokenizer, text)
    assert "".join(tokenizer.id_to_token(i) for i in ids.tolist()) == text


def test_other_characters_are_unknown_and_counted():
    tokenizer = character_tokenizer("abc")
    ids = encode(tokenizer, "aZb\U0001f600\n")
    assert count_unknown(tokenizer, ids) == 3
    assert tokenizer.id_to_token(int(ids[1])) == UNKNOWN
    assert tokenizer.get_vocab_size() == 4


def test_pieces_give_the_same_character_tokenizer():
    text = "two\nlines\u00e9"
    assert character_tokenizer(list(text)).to_str() == character_tokenizer(text).to_str()
    assert make_tokenizer("characters", [text]).to_str() == character_tokenizer(text).to_str()


# Bytes and BPE.


@given(ANY_TEXT)
def test_bytes_are_the_bytes(text):
    tokenizer = make_tokenizer("bytes", "unused")
    ids = encode(tokenizer, text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == 256
    assert count_unknown(tokenizer, ids) == 0


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_awkward_bytes_come_back(spec, text):
    tokenizer = make_tokenizer(spec, PROSE)
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_bpe_has_its_tokens_is_the_same_each_time_and_shortens():
    tokenizer = make_tokenizer("bpe:320", PROSE)
    again = make_tokenizer("bpe:320", [PROSE[i : i + 7] for i in range(0, len(PROSE), 7)])
    assert tokenizer.to_str() == again.to_str()
    assert tokenizer.get_vocab_size() == 320
    assert len(encode(tokenizer, PROSE)) < 0.7 * len(PROSE.encode())
    assert make_tokenizer("bpe:300", PROSE).to_str() != tokenizer.to_str()


@given(ANY_TEXT)
def test_bpe_gives_any_text_back_and_knows_all_of_it(text):
    tokenizer = BPE
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert count_unknown(tokenizer, ids) == 0


@pytest.mark.parametrize("spec", ["bpe:256", "bpe:", "bpe:-3", "bpe:4k", "bpe:300.5", "bpe:\u0663"])
def test_a_bpe_of_a_wrong_size_is_a_config_error(spec):
    with pytest.raises(ConfigError, match="expected bpe:N with N at least 257") as caught:
        make_tokenizer(spec, PROSE)
    assert repr(spec) in str(caught.value)


def test_a_bpe_larger_than_its_text_yields_is_a_config_error():
    with pytest.raises(ConfigError, match=r"a training text .* got one for at most bpe:26"):
        make_tokenizer("bpe:4096", "the fox the fox")


# Cuts.


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(special_tokens=["[UNK]"], **TRAINING)


def sentence_piece():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        special_tokens=["<oov>"], unk_token="<oov>", vocab_size=120, show_progress=False
    )


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer, trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        **{**TRAINING, "vocab_size": 400},
    )


TRAINING = {"vocab_size": 150, "show_progress": False}


def trained(make):
    tokenizer, trainer = make()
    tokenizer.train_from_iterator([PROSE], trainer)
    return tokenizer


FOREIGN = {make.__name__: trained(make) for make in (word_piece, sentence_piece, byte_level)}
OWN = {spec: make_tokenizer(spec, PROSE) for spec in ("characters", "bytes")} | {"bpe": BPE}


@pytest.mark.parametrize("name", [*FOREIGN, *OWN])
def test_a_long_text_has_the_ids_of_the_text_at_once(name, monkeypatch):
    tokenizer = {**FOREIGN, **OWN}[name]
    text = prose(40_000, seed=1)
    at_once = tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(tokenizers_of_offramp, "_CUT_AFTER", 50)
    assert len(list(cut_apart(text))) > 300
    assert encode(tokenizer, text).tolist() == at_once


@pytest.mark.parametrize("name", OWN)
def test_a_long_stretch_without_a_place_to_cut_is_cut_all_the_same(name, monkeypatch):
    monkeypatch.setattr(tokenizers_of_offramp, "_CUT_AFTER", 50)
    monkeypatch.setattr(tokenizers_of_offramp, "_CUT_BEFORE", 120)
    text = "the\n\n   \n\n" * 200
    assert [len(piece) for piece in cut_apart(text)][:3] == [120, 120, 120]
    tokenizer = OWN[name]
    ids = encode(tokenizer, text).tolist()
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    if name != "bpe":
        assert ids == tokenizer.encode(text).ids


@given(st.text("ab \n", max_size=300), st.integers(1, 50))
def test_the_cuts_depend_on_the_text_alone(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers_of_offramp, "_CUT_AFTER", 10)
        patch.setattr(tokenizers_of_offramp, "_CUT_BEFORE", 25)
        cuts = list(cut_apart(text))
        assert "".join(cuts) == text
        assert all(1 <= len(cut) <= 27 for cut in cuts)
        assert list(cut_apart([text[i : i + size] for i in range(0, len(text), size)])) == cuts


def test_a_long_text_is_encoded_a_part_at_a_time():
    read = 0

    def pieces():
        nonlocal read
        for _ in range(400):
            read += 1
            yield PROSE

    first = next(encode_pieces(BPE, pieces()))
    assert read < 100
    assert first.tolist() == BPE.encode(next(cut_apart(PROSE))).ids


@pytest.mark.parametrize("text", ["x" * 2_000_000, "\n" * 2_000_000, "ab " * 700_000])
def test_a_long_text_takes_time_in_proportion(text):
    start = time.perf_counter()
    pieces = list(cut_apart(text))
    assert sum(map(len, pieces)) == len(text)
    assert time.perf_counter() - start < 2  # of quadratic time it would be minutes


def test_unknown_tokens_are_counted_whatever_they_are_called():
    text = "the fox \u4e2d\u6587 the"
    assert count_unknown(FOREIGN["word_piece"], encode(FOREIGN["word_piece"], text)) == 2
    assert count_unknown(FOREIGN["sentence_piece"], encode(FOREIGN["sentence_piece"], text)) == 1
    assert count_unknown(FOREIGN["byte_level"], encode(FOREIGN["byte_level"], text)) == 0


def test_a_token_that_reads_like_the_unknown_one_is_known():
    tokenizer = Tokenizer(models.WordLevel({UNKNOWN: 0, "[X]": 1}, unk_token="[X]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = encode(tokenizer, "<unk> other <unk>")
    assert ids.tolist() == [0, 1, 0]
    assert count_unknown(tokenizer, ids) == 1


def test_a_tokenizer_that_cannot_encode_a_text_is_a_sentence():
    broken = Tokenizer(models.WordLevel({"a": 0}, unk_token="<none>"))
    for encode_text in (encode, encode_prompt):
        assert list(encode_text(broken, "a")) == [0]
        with pytest.raises(CorpusError, match=r"can encode this text.*Missing \[UNK\]"):
            encode_text(broken, "b")
