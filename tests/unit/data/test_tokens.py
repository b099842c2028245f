import json
import os
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from offramp.data import (
    Text,
    TokenShards,
    character_tokenizer,
    encode,
    make_tokenizer,
    stream_corpus,
    tokenise,
)
from offramp.data import tokenizer as tokenizers_of_offramp
from offramp.data import tokens as tokens_module
from offramp.errors import ConfigError, CorpusError, OfframpWarning

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 30 + "\u00e9nd"
TOKENIZER = character_tokenizer(TEXT)
IDS = encode(TOKENIZER, TEXT)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shard_tokens", [1, 7, len(TEXT) - 1, len(TEXT), len(TEXT) + 1])
def test_the_shards_hold_the_tokens(tmp_path, shard_tokens):
    text = TEXT[:99] if shard_tokens == 1 else TEXT
    shards = tokenise(text, TOKENIZER, tmp_path, shard_tokens=shard_tokens)
    expected = IDS[: len(text)]
    assert len(shards) == len(text)
    assert torch.equal(shards.read(0, len(shards)), expected)
    assert max(shards.about["lengths"]) <= shard_tokens
    assert sum(shards.about["lengths"]) == len(shards)
    for start in range(0, len(shards), 13):
        for length in (0, 1, 6, 8, 40):
            assert torch.equal(shards.read(start, start + length), expected[start : start + length])
    assert shards.read(0, 1).dtype == torch.long
    assert len(shards.read(len(shards), len(shards) + 5)) == 0


def test_the_shards_are_memory_maps_of_the_smallest_type(tmp_path):
    shards = tokenise(TEXT, TOKENIZER, tmp_path)
    assert isinstance(shards._shards[0], np.memmap)
    assert shards.about["dtype"] == "uint16"
    stored = np.load(shards.folder / "00000.npy", allow_pickle=False)
    assert stored.dtype == np.uint16
    many = character_tokenizer("".join(map(chr, range(0x10000, 0x20000))))  # and <unk>
    wide = tokenise("\U0001ffff\U00010000a", many, tmp_path)
    assert wide.about["dtype"] == "uint32"
    assert wide.read(0, 3).tolist() == [65536, 1, 0]
    assert wide.unknown_tokens == 1
    exact = character_tokenizer("".join(map(chr, range(0x10000, 0x1FFFF))))  # 65,536 with <unk>
    assert tokenise("\U0001fffe", exact, tmp_path).about["dtype"] == "uint16"


def test_a_second_call_reads_what_the_first_kept(tmp_path, monkeypatch):
    seen = []
    first = tokenise(TEXT, TOKENIZER, tmp_path, shard_tokens=500, on_tokens=seen.append)
    assert seen == [500, 1000, len(TEXT)]

    def never(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens_module, "encode_pieces", never)
    again = tokenise(list(TEXT), TOKENIZER, tmp_path)
    assert again.folder == first.folder
    assert torch.equal(again.read(0, len(TEXT)), IDS)
    for other in ((TEXT + ".", TOKENIZER), (TEXT, make_tokenizer("bytes", TEXT))):
        with pytest.raises(AssertionError, match="tokenised again"):
            tokenise(*other, tmp_path)
    assert files(tmp_path) == [first.folder.name]  # nothing of what failed


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-2])


def emptied(path):
    path.write_bytes(b"")


def not_json(path):
    path.write_text("{")


def another_length(path):
    about = json.loads(path.read_text())
    about["lengths"][0] += 1
    path.write_text(json.dumps(about))


def another_id(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def an_id_above_the_vocabulary(path):
    ids = np.load(path)
    ids[3] = 60_000
    np.save(path, ids)


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def of_another_text(path):
    other = tokenise(TEXT[::-1], TOKENIZER, path.parent.parent / "other", shard_tokens=500)
    path.write_bytes((other.folder / path.name).read_bytes())


def another_count(path):
    path.write_text(path.read_text().replace('"unknown_tokens": 0', '"unknown_tokens": 9'))


def nested(path):
    path.write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("00000.npy", another_id),
        ("00001.npy", an_id_above_the_vocabulary),
        ("00000.npy", a_pipe),
        ("about.json", a_pipe),
        ("00000.npy", of_another_text),
        ("about.json", of_another_text),
        ("about.json", another_count),
        ("about.json", nested),
        ("00000.npy", cut_short),
        ("00001.npy", emptied),
        ("00002.npy", os.unlink),
        ("about.json", os.unlink),
        ("about.json", not_json),
        ("about.json", emptied),
        ("about.json", another_length),
    ],
)
def test_a_damaged_or_changed_token_cache_is_noticed_and_made_anew(tmp_path, name, damage):
    folder = tokenise(TEXT, TOKENIZER, tmp_path, shard_tokens=500).folder
    damage(folder / name)
    with pytest.raises(CorpusError, match="expected whole token shards"):
        TokenShards(folder)
    again = tokenise(TEXT, TOKENIZER, tmp_path, shard_tokens=500)
    assert torch.equal(again.read(0, len(TEXT)), IDS)
    assert folder.name in files(tmp_path)
    assert files(folder) == ["00000.npy", "00001.npy", "00002.npy", "about.json"]


def test_a_whole_cache_of_another_text_under_this_name_is_made_anew(tmp_path):
    folder = tokenise(TEXT, TOKENIZER, tmp_path, shard_tokens=500).folder
    other = tokenise(TEXT[::-1], TOKENIZER, tmp_path, shard_tokens=500).folder
    shutil.rmtree(folder)
    other.rename(folder)
    again = tokenise(TEXT, TOKENIZER, tmp_path, shard_tokens=500)
    assert torch.equal(again.read(0, len(TEXT)), IDS)


KILLED = """
import os, signal, sys
from pathlib import Path
from offramp.data import character_tokenizer, tokenise
text = sys.argv[2]
tokenise(text, character_tokenizer(text), Path(sys.argv[1]), shard_tokens=500,
         on_tokens=lambda _: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_tokenisation_leaves_nothing_that_is_taken_for_whole(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, TEXT], check=False)
    assert done.returncode == -9
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith(".")
    assert files(aside) == ["00000.npy"]
    shards = tokenise(TEXT, TOKENIZER, tmp_path, shard_tokens=500)
    assert torch.equal(shards.read(0, len(TEXT)), IDS)
    assert files(tmp_path) == sorted([aside.name, shards.folder.name])  # it may yet live
    os.utime(aside, (time.time() - 2 * 24 * 3600,) * 2)
    other = tokenise("the", TOKENIZER, tmp_path)
    assert files(tmp_path) == sorted([shards.folder.name, other.folder.name])


def test_of_two_that_tokenise_the_same_the_first_is_kept(tmp_path):
    inner, kept = [], []

    def another(_):
        if not inner:
            inner.append(None)
            inner[0] = tokenise(TEXT, TOKENIZER, tmp_path)
            kept.append((inner[0].folder / "about.json").stat().st_ino)

    shards = tokenise(TEXT, TOKENIZER, tmp_path, on_tokens=another)
    assert shards.folder == inner[0].folder
    assert (shards.folder / "about.json").stat().st_ino == kept[0]
    assert torch.equal(inner[0].read(0, len(TEXT)), IDS)
    assert files(tmp_path) == [shards.folder.name]


def test_a_file_is_tokenised_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers_of_offramp, "_CUT_AFTER", 100)
    monkeypatch.setattr(tokenizers_of_offramp, "_CUT_BEFORE", 200)
    monkeypatch.setattr("offramp.data.text._READ_BYTES", 64)
    monkeypatch.setattr(Text, "read", None)
    (tmp_path / "text.txt").write_text(TEXT)
    corpus = stream_corpus(str(tmp_path / "text.txt"))
    tokenizer = make_tokenizer("bpe:270", corpus.train)
    shards = tokenise(corpus.train, tokenizer, tmp_path / "tokens", shard_tokens=50)
    train = TEXT[: len(TEXT) * 9 // 10]
    assert tokenizer.decode(shards.read(0, len(shards)).tolist()) == train
    assert shards.read(0, len(shards)).tolist() == tokenizer.encode(train).ids


def test_an_empty_text_has_no_tokens(tmp_path):
    for _ in range(2):
        shards = tokenise("", TOKENIZER, tmp_path)
        assert len(shards) == len(shards.read(0, 10)) == 0


def test_another_process_maps_the_files_itself(tmp_path):
    shards = tokenise(TEXT, TOKENIZER, tmp_path)
    packed = pickle.dumps(shards)
    assert len(packed) < 500
    assert torch.equal(pickle.loads(packed).read(3, 50), IDS[3:50])


def test_a_text_that_changes_meanwhile_is_refused_and_nothing_is_kept(tmp_path):
    versions = iter(["one", "two", "two"])
    with pytest.raises(CorpusError, match="it changed while it was read"):
        tokenise(Text(lambda: [next(versions)]), TOKENIZER, tmp_path)
    assert files(tmp_path) == []


def test_pieces_that_can_be_read_once_only_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="pieces that can be read twice, got a generator"):
        tokenise((piece for piece in TEXT), TOKENIZER, tmp_path)
    with pytest.raises(ConfigError, match="shard_tokens: expected at least 1, got 0"):
        tokenise(TEXT, TOKENIZER, tmp_path, shard_tokens=0)


def in_memory(folder):
    with pytest.warns(OfframpWarning, match="tokens cannot be stored there .*kept in memory"):
        return tokenise(TEXT, TOKENIZER, folder, shard_tokens=100)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        shards = in_memory(folder)
        assert torch.equal(shards.read(0, len(shards)), IDS)
        assert shards.unknown_tokens == tokenise(TEXT, TOKENIZER, tmp_path / "a").unknown_tokens
        again = pickle.loads(pickle.dumps(shards))
        assert torch.equal(again.read(90, 210), IDS[90:210])


def test_a_cache_on_a_full_disk_is_done_without(small_disk):
    (small_disk / "more").write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    shards = in_memory(small_disk / "tokens")
    assert torch.equal(shards.read(0, len(shards)), IDS)
    assert files(small_disk / "tokens") == []
