import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.data import (
    UNKNOWN,
    batches,
    character_tokenizer,
    count_unknown,
    encode,
    load_corpus,
)
from offramp.errors import CorpusError
from offramp.models.transformer import DecoderConfig
from offramp.training import new_model

# Corpora.


def test_the_pangram_is_the_seeds_text():
    corpus = load_corpus("pangram")
    assert (len(corpus.train), len(corpus.validation)) == (100_000, 10_000)
    sentence = "The quick brown fox jumps over the lazy dog. "
    assert corpus.train[:135] == sentence * 3
    assert corpus.train[45 * 2222 :] == sentence[:10]
    assert corpus.validation.startswith("A quick brown dog runs in the park. A quick")
    assert corpus.validation[36 * 277 :] == "A quick brown dog runs in th"
    assert corpus.whole == corpus.train + corpus.validation


def test_the_pangrams_tokens_and_model_are_the_seeds():
    corpus = load_corpus("pangram")
    tokenizer = character_tokenizer(corpus.train)
    assert tokenizer.get_vocab_size() == 30
    assert count_unknown(tokenizer, encode(tokenizer, corpus.train)) == 0
    validation = encode(tokenizer, corpus.validation)
    assert count_unknown(tokenizer, validation) == corpus.validation.count("A") == 278
    config = DecoderConfig(
        vocab_size=30,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        norm="post",
    )
    assert sum(p.numel() for p in new_model(config, seed=0).parameters()) == 200_832


@pytest.mark.parametrize(("part", "expected"), [("train", 48), ("validation", 4)])
def test_the_pangrams_batches_are_the_seeds(part, expected):
    corpus = load_corpus("pangram")
    ids = encode(character_tokenizer(corpus.train), getattr(corpus, part))
    shapes = [x.shape for x, _ in batches(ids, seq_len=64, batch_size=32, drop_last=True)]
    assert shapes == [(32, 64)] * expected


def test_python_docs_load_the_same_each_time():
    corpus = load_corpus("python-docs")
    assert corpus == load_corpus("python-docs")
    assert len(corpus.whole) > 300_000
    assert "assert" in corpus.whole


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 12345])
def test_the_first_nine_tenths_train(tmp_path, length):
    text = "".join(chr(ord("a") + i % 26) for i in range(length))
    (tmp_path / "text.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "text.txt"))
    assert corpus.whole == text
    assert len(corpus.train) == length * 9 // 10
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert "90%" in corpus.split


def test_a_folder_is_read_in_the_order_of_names_without_dotfiles(tmp_path):
    folder = tmp_path / ".home" / "texts"  # a dot above the folder does not count
    for name, text in {
        "b.txt": "two",
        "a.txt": "one",
        "c/d.txt": "three",
        "c/.e.txt": "hidden",
        ".git/f.txt": "hidden",
        ".g.txt": "hidden",
        "z": "four",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert load_corpus(str(folder)).whole == "one\ntwo\nthree\nfour"


def test_wrong_paths_are_corpus_errors(tmp_path):
    cases = {
        tmp_path / "none.txt": "no such path",
        tmp_path / "empty.txt": "empty corpus",
        tmp_path / "blank.txt": "empty corpus",
        tmp_path / "latin.txt": "not UTF-8 at offset 2",
        tmp_path / "folder": "empty one",
        tmp_path / "mixed": "not UTF-8",
    }
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1")[1:])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden").write_text("hidden")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("text")
    (tmp_path / "mixed" / "b.bin").write_bytes(b"\xff\xfe\x00")
    for path, message in cases.items():
        with pytest.raises(CorpusError) as caught:
            load_corpus(str(path))
        assert message in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["pangrams", "", "a text, not a path. " * 400, "a\0b"])
def test_a_name_that_is_no_corpus_is_a_corpus_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError):
        load_corpus(name)


# Tokens.


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_encoding_and_decoding_give_the_text_back(text):
    tokenizer = character_tokenizer(text)
    ids = encode(tokenizer, text)
    assert ids.dtype == torch.long
    assert len(ids) == len(text)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert count_unknown(tokenizer, ids) == 0


@pytest.mark.parametrize(
    "text",
    ["a\nb\r\nc\n\n", "\tx\t", "\U0001f600 \U00010348", "e\u0301\u00e9", "  two  ", "<unk>", ""],
)
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


# Batches.


@given(st.integers(0, 100), st.integers(1, 12), st.integers(1, 5), st.one_of(st.none(), st.just(3)))
def test_every_token_but_the_first_is_a_target_once(length, seq_len, batch_size, seed):
    ids = torch.arange(length)
    order = None if seed is None else torch.Generator().manual_seed(seed)
    seen = []
    for inputs, targets in batches(ids, seq_len=seq_len, batch_size=batch_size, order=order):
        assert inputs.shape == targets.shape
        assert 1 <= inputs.shape[0] <= batch_size
        assert 1 <= inputs.shape[1] <= seq_len
        assert torch.equal(inputs + 1, targets)
        seen += targets.flatten().tolist()
    assert (seen if order is None else sorted(seen)) == list(range(1, length))


@given(st.integers(0, 100), st.integers(1, 12), st.integers(1, 5))
def test_drop_last_leaves_whole_batches_of_whole_windows(length, seq_len, batch_size):
    read = list(
        batches(torch.arange(length), seq_len=seq_len, batch_size=batch_size, drop_last=True)
    )
    expected = max(length - 1, 0) // seq_len // batch_size
    assert [x.shape for x, _ in read] == [(batch_size, seq_len)] * expected
    targets = [t for _, y in read for t in y.flatten().tolist()]
    assert targets == list(range(1, expected * batch_size * seq_len + 1))


def test_a_shuffled_order_is_a_repeatable_permutation_of_the_windows():
    ids = torch.arange(8 * 20 + 1)

    def windows(order):
        read = batches(ids, seq_len=8, batch_size=4, drop_last=True, order=order)
        return [row.tolist() for inputs, _ in read for row in inputs]

    plain = windows(None)
    generator = torch.Generator().manual_seed(7)
    first, second = windows(generator), windows(generator)
    assert sorted(first) == sorted(second) == plain
    assert len({str(plain), str(first), str(second)}) == 3  # a new order each epoch
    assert windows(torch.Generator().manual_seed(7)) == first
