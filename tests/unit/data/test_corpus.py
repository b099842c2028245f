import hashlib
from pathlib import Path

import pytest

from offramp.data import (
    batches,
    character_tokenizer,
    count_unknown,
    encode,
    load_corpus,
    stream_corpus,
)
from offramp.data import text as text_module
from offramp.errors import CorpusError
from offramp.models.native.config import DecoderConfig
from offramp.training.loop import new_model

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
    (folder / "a.pyc").write_bytes(b"\xcb\r\r\n\x00\x00binary")
    assert load_corpus(str(folder)).whole == "one\ntwo\nthree\nfour"


def test_wrong_paths_are_corpus_errors(tmp_path):
    cases = {
        tmp_path / "none.txt": "no such path",
        tmp_path / "empty.txt": "empty corpus",
        tmp_path / "blank.txt": "empty corpus",
        tmp_path / "latin.txt": "not UTF-8 at offset 2",
        tmp_path / "folder": "got one without",
        tmp_path / "mixed": "not UTF-8",
    }
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1")[1:])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden").write_text("hidden")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("text")
    (tmp_path / "mixed" / "b.bin").write_bytes(b"\xff\xfeU\x00T\x00F\x00-\x001\x006\x00")
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


# Named splits.


def write(folder: Path, **files: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


@pytest.mark.parametrize("validation", ["valid", "validation"])
def test_a_folder_with_named_files_has_named_splits(tmp_path, validation):
    name = write(tmp_path, train="to train", test="to test", notes="other", **{validation: "to"})
    corpus = load_corpus(name)
    assert (corpus.train, corpus.validation, corpus.test) == ("to train", "to", "to test")
    assert corpus.whole == "to train" + "to" + "to test"
    assert corpus.split == (
        f"the file train.txt trains, {validation}.txt validates, test.txt is kept for testing"
    )


def test_without_a_validation_file_the_training_file_is_parted_and_that_is_said(tmp_path):
    corpus = load_corpus(write(tmp_path, train="0123456789", test="to test"))
    assert (corpus.train, corpus.validation, corpus.test) == ("012345678", "9", "to test")
    assert "90% of the characters of the file train.txt" in corpus.split
    assert "test.txt is kept for testing" in corpus.split


def test_a_test_file_alone_is_a_text_like_another(tmp_path):
    corpus = load_corpus(write(tmp_path, a="one", test="two"))
    assert corpus.whole == "one\ntwo"
    assert corpus.test is None


def test_the_hash_tells_where_named_splits_end(tmp_path):
    parts = [("ab", "cd", "e"), ("abc", "d", "e"), ("ab", "c", "de"), ("ab", "cd", "f")]
    hashes = []
    for index, (train, valid, test) in enumerate(parts):
        folder = write(tmp_path / str(index), train=train, valid=valid, test=test)
        hashes.append(load_corpus(folder).sha256)
    assert len(set(hashes)) == 4
    assert hashes[0] == hashlib.sha256(b"ab\xffcd\xffe").hexdigest()


def test_a_folder_without_training_text_of_that_name_is_a_folder_of_texts(tmp_path):
    """As the validation and test splits of WikiText-2 are when they stand alone."""
    name = write(tmp_path, valid="abcdefgh", test="ijklmnopq")
    corpus = load_corpus(name)
    assert sorted(corpus.whole) == sorted("abcdefgh" + "ijklmnopq" + "\n")
    assert corpus.test is None
    assert "first 90%" in corpus.split


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": "a", "valid": " \n"}, "expected text in the file valid.txt, got none"),
        ({"train": "", "valid": "a"}, "expected text in the file train.txt, got none"),
        ({"train": "a", "valid": "b", "test": ""}, "expected text in the file test.txt, got none"),
        (
            {"train": "a", "valid": "b", "validation": "c"},
            "expected one file of validation and valid, got both",
        ),
    ],
)
def test_missing_empty_and_double_splits_are_named(tmp_path, files, message):
    name = write(tmp_path, **files)
    with pytest.raises(CorpusError) as caught:
        load_corpus(name)
    assert message in str(caught.value)
    assert name in str(caught.value)


# Streams.


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1 << 20])
def test_a_file_is_read_piece_by_piece_as_if_at_once(tmp_path, monkeypatch, size):
    monkeypatch.setattr(text_module, "_READ_BYTES", size)
    path = tmp_path / "text.txt"
    path.write_bytes("caf\u00e9 \U0001f600\r\nline\rend\u4e2d\r\n".encode())
    expected = path.read_text(encoding="utf-8")
    corpus = stream_corpus(str(path))
    assert (corpus.train.read() + corpus.validation.read()) == expected
    assert corpus.train.read() == expected[: len(expected) * 9 // 10]
    assert corpus.train.read() == corpus.train.read()  # anew each time
    assert max(map(len, corpus.train)) <= size + 1  # a held \r
    assert corpus.sha256 == hashlib.sha256(expected.encode()).hexdigest()
    assert corpus.read() == load_corpus(str(path))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 1 << 20])
@pytest.mark.parametrize(("content", "offset"), [(b"ab\xc3\xa9d\xffef", 5), (b"abcde\xe4\xb8", 5)])
def test_a_byte_that_is_not_utf8_is_named_by_its_place_in_the_file(
    tmp_path, monkeypatch, size, content, offset
):
    monkeypatch.setattr(text_module, "_READ_BYTES", size)
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=f"not UTF-8 at offset {offset}$"):
        stream_corpus(str(tmp_path / "text.txt"))


def test_the_parts_of_a_text_are_those_of_its_characters():
    text = text_module.Text(lambda: ["ab", "", "cde", "f"])
    for start in range(8):
        assert text.part(start).read() == "abcdef"[start:]
        for stop in range(8):
            assert text.part(start, stop).read() == "abcdef"[start:stop]
