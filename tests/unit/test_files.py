"""Files are written whole or not at all; damaged ones are refused with their name."""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from offramp.errors import CheckpointError, ConfigError
from offramp.files import (
    count_parameters,
    file_sha256,
    obey_umask,
    read_tensors,
    replacing,
    stored_fields,
    tensor_infos,
    write_json,
)
from offramp.reading import parsing, read_json


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_json_is_written_and_read(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": [1, math.inf, -math.inf], 2: "é"})
    assert read_json(path) == {"x": [1, "inf", "-inf"], "2": "é"}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="expected readable JSON"):
        read_json(path)
    with pytest.raises(CheckpointError, match="found none"):
        read_json(tmp_path / "none.json")


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)

    def fail():
        with replacing(path) as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert read_json(path) == 1
    assert names(tmp_path) == ["a.json"]


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_json(tmp_path / "none" / "a.json", 1)


def test_a_full_disk_is_a_sentence_and_changes_nothing(small_disk):
    """SafetensorError is no OSError; numpy's error of a full disk has no number."""
    path = small_disk / "a"
    path.write_text("before")
    writes = (
        lambda aside: save_file({"a": np.zeros(1_000_000)}, aside),
        lambda aside: aside.write_bytes(bytes(1_000_000)),
        lambda aside: np.zeros(1_000_000).tofile(aside),
    )
    for write in writes:
        with pytest.raises(CheckpointError, match=r"a: cannot be written: "), replacing(path) as a:
            write(a)
        assert path.read_text() == "before"
        assert names(small_disk) == ["a"]
    expected = pytest.raises(CheckpointError, match=r"written: No space left on device$")
    with expected, replacing(path) as aside:
        save_file({"a": np.zeros(1_000_000)}, aside)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "a.json", tmp_path / "link.json"
    link.symlink_to(target)
    for content in (1, 2):  # the file that the link names is not there at first
        write_json(link, content)
        assert read_json(target) == content
        assert link.is_symlink()
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_json(link, 3)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can replace a device")
def test_a_device_is_written_to_and_not_replaced(tmp_path):
    device = tmp_path / "null"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    write_json(device, 1)
    (tmp_path / "link").symlink_to(device)
    write_json(tmp_path / "link", 1)
    assert stat.S_ISCHR(device.stat().st_mode)
    assert sorted(names(tmp_path)) == ["link", "null"]
    full = tmp_path / "full"
    os.mknod(full, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
    with pytest.raises(CheckpointError, match="full: cannot be written: No space left on device"):
        write_json(full, 1)


def test_a_pipe_gets_the_content_or_is_refused_if_nobody_reads(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match="expected a program that reads from this pipe"):
        write_json(pipe, 1)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
    assert names(tmp_path) == ["pipe"]


def test_a_descriptor_gets_the_content(tmp_path):
    reader, writer = os.pipe()
    write_json(Path(f"/dev/fd/{writer}"), {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
    os.close(writer)


def test_a_folder_is_no_file_to_write_to(tmp_path):
    with pytest.raises(CheckpointError, match="expected the name of a file, got a folder"):
        write_json(tmp_path, 1)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_obey_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~mask


def test_a_file_system_without_permissions_is_no_error(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    write_json(tmp_path / "a.json", 1)
    obey_umask(tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == 1


def test_tensors_are_read_and_counted(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}, path)
    assert len(tensor_infos(path)) == 2
    assert count_parameters(path) == 10
    assert {name: tuple(t.shape) for name, t in read_tensors(path).items()} == {
        "a": (2, 3),
        "b": (4,),
    }


@pytest.mark.parametrize("read", [tensor_infos, count_parameters, read_tensors])
def test_damaged_tensors_are_refused(tmp_path, read):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="found none"):
        read(path)
    save_file({"a": np.zeros(30, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="expected whole safetensors"):
        read(path)


def test_the_hash_of_files_is_that_of_their_concatenation(tmp_path):
    for name, text in (("a", "one"), ("b", "two"), ("ab", "onetwo")):
        (tmp_path / name).write_text(text)
    assert file_sha256(tmp_path / "a", tmp_path / "b") == file_sha256(tmp_path / "ab")
    with pytest.raises(CheckpointError, match="found none"):
        file_sha256(tmp_path / "none")


@pytest.mark.parametrize(
    "fail",
    [
        lambda: {}["x"],
        lambda: [][1],
        lambda: None.x,
        lambda: int("x"),
        lambda: int(math.inf),
        lambda: dict(5),
    ],
)
def test_errors_of_parsing_name_the_file(fail):
    expected = r"^a\.json: expected a record, got: "
    with pytest.raises(CheckpointError, match=expected), parsing(Path("a.json"), "a record"):
        fail()


def test_parsing_keeps_the_errors_of_offramp():
    with pytest.raises(ConfigError, match=r"^steps"), parsing(Path("a.json"), "a record"):
        raise ConfigError("steps: expected at least 1")


@dataclass
class Stored:
    old: int = 1
    new: int = 2


def test_a_field_at_its_default_that_the_format_lacks_is_not_stored():
    assert stored_fields(Stored(), ["old"]) == {"old": 1}
    assert stored_fields(Stored(new=3), ["old"]) == {"old": 1, "new": 3}
    assert json.dumps(stored_fields(Stored(), ["new", "old"])) == '{"old": 1, "new": 2}'
