"""No outside file blocks, fills the memory or ends in a traceback."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from offramp.errors import CheckpointError
from offramp.files import count_parameters, read_tensors
from offramp.reading import open_regular, parsing, read_as, read_bytes, read_json


@dataclass(frozen=True, kw_only=True)
class About:
    steps: int


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a": ' * 10_000 + b"1" + b"}" * 10_000,
        b'{"a": 1, "a": 2}',
        b'{"a": "\\ud800"}',
        b'{"\\uDC00": 1}',
        b"1" * 5_000,
        b"\x00",
        b'{"a": "\xff"}',
    ],
)
def test_what_is_no_json_is_refused_in_a_sentence(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="expected readable JSON") as error:
        read_json(path)
    assert "\n" not in str(error.value)


def test_a_field_of_a_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"steps": "abc"}')
    with pytest.raises(CheckpointError, match=r"a\.json: steps: expected a whole .*, got 'abc'"):
        read_as(About, path)
    path.write_text('{"steps": 3, "more": 1}')
    with pytest.raises(CheckpointError, match=r"a\.json: more: expected no such field"):
        read_as(About, path)
    assert read_as(About, path, foreign=True) == About(steps=3)


def no_file(folder: Path, kind: str) -> Path:
    path = folder / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(folder / "there")
        path.symlink_to("there")
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to("loop")
    elif kind == "socket":
        os.chdir(folder)
        socket.socket(socket.AF_UNIX).bind(kind)
    elif kind == "NUL":
        path = folder / "a\0b"
    elif kind == "long name":
        path = folder / ("x" * 5000)
    return path


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    "kind",
    ["none", "pipe", "link to a pipe", "folder", "device", "loop", "socket", "NUL", "long name"],
)
def test_only_a_regular_file_is_read_and_none_is_waited_for(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = no_file(tmp_path, kind)
    for read in (read_json, read_tensors, count_parameters):
        with pytest.raises(CheckpointError, match=r"expected a file|cannot be read"):
            read(path)


def test_the_size_is_checked_before_a_file_is_read(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="expected at most 67,108,864 bytes, got 1,073,"):
        read_json(path)
    path.write_bytes(b"12345")
    assert read_bytes(path, at_most=5) == b"12345"
    with (
        pytest.raises(CheckpointError, match="expected at most 4 bytes, got 5"),
        open_regular(path, at_most=4),
    ):
        pass


class PanicException(BaseException):
    """As pyo3 names what a panic in Rust raises."""


def test_a_panic_of_a_library_in_rust_is_a_sentence(tmp_path):
    def panic():
        with parsing(tmp_path / "tokenizer.json", "a tokenizer"):
            raise PanicException("regex")

    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer, got: regex"):
        panic()

    def interrupt():
        with parsing(tmp_path / "tokenizer.json", "a tokenizer"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        (10**18).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{",
        b"\x02" + b"\x00" * 7 + b"[]",
        *(
            len(header).to_bytes(8, "little") + header + b"\x00" * 16
            for header in (
                b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}',
                b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}',
                b'{"a":{"dtype":"X32","shape":[4],"data_offsets":[0,16]}}',
                b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
                b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
                b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
                b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
                b'{"a":3}',
                b'{"__metadata__":{"a":3}}',
            )
        ),
    ],
)
def test_hostile_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="expected whole safetensors"):
        read_tensors(path)
