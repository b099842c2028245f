"""Every kind of outside file, damaged in every way: one sentence or no harm.

A valid file of a tiny model is changed at a random place, and a command that reads it is run.
``FUZZ`` is the number of examples of all fuzzers together (``make fuzz``).
"""

import hashlib
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import OfframpError
from offramp.evaluation.trace import ExitTrace
from offramp.files import file_sha256
from offramp.report.study_json import read_scale, read_study, read_times
from offramp.studies.study.chosen import chosen_study
from offramp.studies.study.frontier import Frontier, full_depth, load_frontiers, save_frontiers
from offramp.studies.study.record import RunRecord, RunTiming

EXAMPLES = int(os.environ.get("FUZZ", "1000"))
STUDIES = Path(__file__).parents[2] / "docs" / "studies"

SWEEP, GENERATE, PROBE = "sweep", "generate", "probe"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file: where it is, and the commands that read it."""

    file: str
    commands: tuple[tuple[str, ...], ...]
    "M is the folder of the model or file, T a short text, F the file and O, P or D the output."
    weight: int = 1


MODEL = (
    ("sweep", "M", "--corpus", "T", "--out", "O"),
    ("generate", "M", "7 quick", "--max-new-tokens", "2", "--threshold", "0.1"),
    ("probe", "M", "--corpus", "T", "--tokens", "32"),
    ("calibrate", "M", "--corpus", "T", "--out", "O"),
)
QUANTISE = ("quantise", "M", "--weights", "int4", "--out", "D")
RESUME = (("train", "--resume", "M"), ("train", "--resume", "M", "--steps", "5"))
TRAIN = (
    *("train", "--corpus", "T", "--out", "D", "--config", "F", "--layers", "2", "--dim", "8"),
    *("--heads", "2", "--steps", "2", "--seq-len", "8", "--batch-size", "2", "--tracker", "none"),
)
PLOT = (("plot", "F", "--out", "P"),)
KINDS = (
    Kind(file="native/config.json", commands=MODEL, weight=3),
    Kind(file="native/tokenizer.json", commands=MODEL, weight=2),
    Kind(file="native/model.safetensors", commands=MODEL),
    Kind(file="int8/config.json", commands=MODEL, weight=2),
    Kind(file="int8/model.safetensors", commands=MODEL, weight=2),
    Kind(file="int4/config.json", commands=MODEL, weight=2),
    Kind(file="int4/model.safetensors", commands=MODEL, weight=2),
    Kind(file="native/model.safetensors", commands=(QUANTISE,)),
    Kind(file="tuned/offramp.json", commands=(QUANTISE,)),
    Kind(file="checkpoint/config.json", commands=MODEL, weight=3),
    Kind(file="checkpoint/generation_config.json", commands=MODEL[1:2]),
    Kind(file="checkpoint/model.safetensors", commands=MODEL),
    Kind(file="split/model.safetensors.index.json", commands=MODEL),
    Kind(file="tuned/offramp.json", commands=MODEL, weight=3),
    Kind(file="tuned/exits.safetensors", commands=MODEL, weight=2),
    Kind(file="tuned/fitted.safetensors", commands=MODEL, weight=2),
    Kind(file="stopped/unfinished.json", commands=RESUME, weight=2),
    Kind(file="stopped/checkpoints/step-00000004/state.json", commands=RESUME, weight=2),
    Kind(file="stopped/checkpoints/step-00000004/optimizer.safetensors", commands=RESUME),
    Kind(file="stopped/metrics.csv", commands=RESUME),
    Kind(file="native/run.json", commands=(RESUME[1],)),
    Kind(
        file="certificate.json",
        commands=(
            ("sweep", "N", "--corpus", "T", "--certificate", "F", "--out", "O"),
            ("generate", "N", "7 quick", "--max-new-tokens", "2", "--certificate", "F"),
            ("calibrate", "N", "--corpus", "T", "--check", "F", "--out", "O"),
            *PLOT,
        ),
        weight=3,
    ),
    Kind(
        file="budget.json",
        commands=(
            ("sweep", "N", "--corpus", "T", "--certificate", "F"),
            ("generate", "N", "7 quick", "--max-new-tokens", "2", "--certificate", "F"),
        ),
    ),
    *(
        Kind(file=name, commands=PLOT)
        for name in ("sweep.json", "probe.json", "confidence.json", "check.json", "metrics.csv")
    ),
    Kind(file="flags.toml", commands=(TRAIN,)),
    Kind(file="flags.json", commands=(TRAIN,)),
    Kind(file="lines.jsonl", commands=(("sweep", "N", "--corpus", "F"),)),
    Kind(file="small.txt", commands=(("sweep", "N", "--corpus", "F"),)),
)  # fmt: skip
TOKENS = (
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "-0", "0", "1", "-1", "1.5"),
    *("true", "false", "null", '""', '"x"', '"inf"', '"nan"', '"\\ud800"', '"\\u0000"', "[]"),
    *("{}", "[[1]]", '[""]', "[null]", '{"a": 1}', '"../x"', '"/dev/zero"', "2", "3", "7", "1e30"),
    *('"١"', '"\\u001b]0;x\\u0007"', "9223372036854775807", "9223372036854775808", "4294967296"),
    *("1" + "0" * 30, "1" * 5_000, '"' + "x" * 5_000 + '"', "[" * 500 + "]" * 500),
    *('{"a":' * 10_000 + "1" + "}" * 10_000, "[" + "1," * 5_000 + "1]", "99999999999", "65536"),
)
BLOBS = (
    *(b"", b"\x00", b"{}", b"[]", b"null", b"0", b'""', b"\xff\xfe\x00", b"[" * 10_000, b"\n"),
    *(
        b"PK\x03\x04",
        b"\x80\x04N.",
        b"\x00" * 4096,
        b"{" * 5_000,
        b"\x93NUMPY\x01\x00",
        b"a,b\n1\n",
    ),
)
SPECIAL = ("folder", "pipe", "device", "loop", "none", "huge", "dangling")
PLACE = st.integers(0, 999)
MUTATION = st.one_of(
    st.tuples(st.just("value"), PLACE, st.sampled_from(TOKENS)),
    st.tuples(st.just("value"), PLACE, st.sampled_from(TOKENS)),
    st.tuples(st.just("drop"), PLACE),
    st.tuples(st.just("add"), PLACE, st.sampled_from(TOKENS)),
    st.tuples(st.just("twice"), PLACE),
    st.tuples(st.just("swap"), PLACE, PLACE),
    st.tuples(st.just("bytes"), PLACE, st.binary(max_size=6)),
    st.tuples(st.just("cut"), PLACE),
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("blob"), st.sampled_from(BLOBS)),
    st.tuples(st.just("prefix"), st.sampled_from((b"\xef\xbb\xbf", b"\x00", b"\n", b"#"))),
    st.tuples(st.just("utf16")),
    st.tuples(st.just("other"), PLACE),
    st.tuples(st.just("special"), st.sampled_from(SPECIAL)),
)


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each value of a JSON document."""
    yield at
    for key, part in _parts(content):
        yield from places(part, (*at, key))


def _parts(content: Any) -> list[tuple[Any, Any]]:
    if isinstance(content, dict):
        return list(content.items())
    return list(enumerate(content)) if isinstance(content, list) else []


def json_text(content: Any, mutation: tuple[Any, ...]) -> str:
    """A JSON document, changed at one place."""
    what, place, *rest = mutation
    every = list(places(content))
    mark, token = "@@mark@@", rest[0] if rest and isinstance(rest[0], str) else "1"
    path = every[place % len(every)]
    if not path:
        return token if what == "value" else json.dumps(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if what == "value":
        parent[path[-1]] = mark
    elif what == "drop":
        del parent[path[-1]]
    elif what == "swap":
        other = every[rest[0] % len(every)]
        value = content
        for key in other:
            value = value[key]
        parent[path[-1]] = json.loads(json.dumps(value))
    elif isinstance(parent, dict):
        parent["@@twice@@" if what == "twice" else "more"] = mark
        text = json.dumps(content).replace('"@@twice@@"', json.dumps(path[-1]))
        return text.replace(f'"{mark}"', token)
    return json.dumps(content).replace(f'"{mark}"', token)


def changed(data: bytes, mutation: tuple[Any, ...], others: list[Path]) -> bytes:
    """The content of a file, damaged."""
    what = mutation[0]
    place = mutation[1] * len(data) // 1000 if len(mutation) > 1 and what in PLACED else 0
    if what == "bytes":
        return data[:place] + mutation[2] + data[place + len(mutation[2]) :]
    if what == "cut":
        return data[:place]
    if what == "flip":
        return data[:place] + bytes([data[place] ^ (1 << mutation[2])]) + data[place + 1 :]
    if what == "blob":
        return bytes(mutation[1])
    if what == "prefix":
        return bytes(mutation[1]) + data
    if what == "utf16":
        return data.decode("utf-8", "replace").encode("utf-16")
    if what == "other":
        return others[mutation[1] % len(others)].read_bytes()
    if data[8:9] == b"{":  # safetensors: its header
        size = struct.unpack("<Q", data[:8])[0]
        header = json_text(json.loads(data[8 : 8 + size]), mutation).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + size :]
    try:
        content = json.loads(data)
    except ValueError:
        return text_changed(data, mutation)
    return json_text(content, mutation).encode("utf-8", "surrogatepass")


PLACED = ("bytes", "cut", "flip")


def text_changed(data: bytes, mutation: tuple[Any, ...]) -> bytes:
    """A text file with one of its words changed, dropped or written twice."""
    words = data.decode("utf-8", "replace").replace(",", " , ").replace('"', ' " ').split(" ")
    place = mutation[1] % len(words)
    token = mutation[2] if len(mutation) > 2 and isinstance(mutation[2], str) else ""
    words[place] = {"value": token, "drop": "", "twice": words[place] * 2}.get(
        mutation[0], words[place] + token
    )
    return " ".join(words).replace(" , ", ",").replace(' " ', '"').encode("utf-8", "surrogatepass")


def make_special(path: Path, kind: str) -> None:
    """Put something in the place of a file that is no regular file, or too large."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 31)


def sign_again(path: Path) -> None:
    """Write the hashes of a changed file anew, as one who wants it to be read does."""
    try:
        content = json.loads(path.read_bytes()) if path.suffix == ".json" else {}
        key = {"certificate.json": "sha256", "state.json": "state_sha256"}.get(path.name)
        if key and key in content:
            rest = {name: value for name, value in content.items() if name != key}
            compact = (",", ":") if key == "sha256" else None
            text = json.dumps(rest, sort_keys=True, separators=compact)
            content[key] = hashlib.sha256(text.encode()).hexdigest()
            path.write_text(json.dumps(content))
        about = path.with_name("offramp.json")
        if path.name == "exits.safetensors":
            content = json.loads(about.read_text()) | {"exits_sha256": file_sha256(path)}
            about.write_text(json.dumps(content))
        state = path.with_name("state.json")
        if path.name == "optimizer.safetensors":
            content = json.loads(state.read_text())
            content["sha256"][path.name] = file_sha256(path)
            state.write_text(json.dumps(content))
            sign_again(state)
    except (ValueError, RecursionError, TypeError, OfframpError, OSError):
        pass


def damage(path: Path, mutation: tuple[Any, ...], others: list[Path], signed: bool) -> None:
    if mutation[0] == "special":
        is_text = path.suffix in (".txt", ".jsonl")  # may be as large as it likes
        make_special(path, "device" if is_text and mutation[1] == "huge" else mutation[1])
        return
    path.write_bytes(changed(path.read_bytes(), mutation, others))
    if signed:
        sign_again(path)


def attack(
    kind: Kind,
    world: Path,
    in_order: Callable[..., Any],
    mutation: tuple[Any, ...],
    command: int,
    signed: bool,
) -> None:
    others = sorted(path for path in world.rglob("*") if path.is_file())
    with TemporaryDirectory() as aside:
        folder = Path(aside)
        first, _, rest = kind.file.partition("/")
        if rest:
            shutil.copytree(world / first, folder / first)
        else:
            shutil.copy(world / first, folder / first)
        path = folder / kind.file
        damage(path, mutation, others, signed)
        names = {
            "M": folder / first,
            "F": path,
            "N": world / "native",
            "T": world / "small.txt",
            "O": folder / "out.json",
            "P": folder / "out.png",
            "D": folder / "out",
        }
        arguments = [names.get(word, word) for word in kind.commands[command % len(kind.commands)]]
        out = next((names[name] for name in "OPD" if names[name] in arguments), None)
        if out is not None and out.suffix and mutation[0] in ("value", "cut"):
            out.write_text("before")
        in_order(*arguments, out=out)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.file.replace("/", "-"))
def test_a_damaged_file_is_a_sentence_or_does_no_harm(kind, world, in_order):
    share = 0.6 * EXAMPLES * kind.weight / sum(each.weight for each in KINDS)

    @settings(max_examples=max(3, round(share)))
    @given(mutation=MUTATION, command=st.integers(0, len(kind.commands) - 1), signed=st.booleans())
    def check(mutation, command, signed):
        attack(kind, world, in_order, mutation, command, signed)

    check()


STUDY_FILES: dict[str, Callable[[Path], object]] = {
    "study.json": read_study,
    "scale.json": read_scale,
    "times.json": read_times,
    "run.json": lambda path: RunRecord.load(path.parent),
    "timing.json": lambda path: RunTiming.load(path.parent),
    "frontiers.npz": load_frontiers,
    "trace.npz": ExitTrace.load,
    "grid.toml": chosen_study,
}
GRID = """seeds = 2
static_layers = [1, 3]
baseline = {loss_weights = "free", exit_layers = [1]}
[model]
num_hidden_layers = 3
exit_layers = [[1], [2, 1]]
kv_source_layer = ["none", 1]
[training]
loss_weights = ["asymmetric:0.3", "free"]
lr = 0.1
[specialise]
compute_budget = 60
add_exits = [1]
"""


@pytest.fixture(scope="session")
def study_files(tmp_path_factory):
    """The files of a study and of its runs."""
    folder = tmp_path_factory.mktemp("study")
    study = json.loads((STUDIES / "heads" / "study.json").read_text())
    (folder / "grid.toml").write_text(GRID)
    study |= {key: part[:1] for key, part in study.items() if isinstance(part, list)}
    (folder / "study.json").write_text(json.dumps(study))
    shutil.copy(STUDIES / "heads" / "timing.json", folder / "times.json")
    shutil.copy(STUDIES / "scale" / "study.json", folder / "scale.json")
    RunRecord(
        label="half",
        config={"seed": 1},
        train_tokens=10,
        test_tokens=5,
        exit_ppl={1: 3.0, 2: 2.0},
        flops={"full": 7.0, "gain gate": 1.0},
        left_at_budget={1: 0.5},
        validations=[{"step": 1}],
    ).save(folder)
    RunTiming(
        seconds={"train": 1.0}, passes={"full": [2.0], "max_prob": [1.0]}, environment={"os": 1}
    ).save(folder)
    sums = np.ones((2, 3))
    frontier = Frontier(
        thresholds=np.array([0.5, np.inf]),
        nll=sums,
        compute_pct=sums,
        flops_pct=sums,
        tokens=np.ones(3),
    )
    save_frontiers(folder / "frontiers.npz", {full_depth("test"): frontier})
    ExitTrace(
        num_layers=2,
        exit_layers=(1, 2),
        targets=np.zeros(4, dtype=np.int64),
        nll=np.ones((2, 4), dtype=np.float32),
        argmax=np.zeros((2, 4), dtype=np.int64),
        confidence={"max_prob": np.ones((2, 4), dtype=np.float32)},
    ).save(folder / "trace.npz")
    return folder


@pytest.mark.parametrize("name", STUDY_FILES)
def test_a_damaged_file_of_a_study_is_a_sentence(name, study_files, in_time):
    @settings(max_examples=max(3, round(0.15 * EXAMPLES / len(STUDY_FILES))))
    @given(mutation=MUTATION)
    def check(mutation):
        others = sorted(study_files.iterdir())
        with TemporaryDirectory() as aside, in_time():
            path = Path(aside) / name
            shutil.copy(study_files / name, path)
            damage(path, mutation, others, signed=False)
            try:
                STUDY_FILES[name](path)
                sentence = str(path)
            except OfframpError as error:
                sentence = str(error)
            assert str(path) in sentence
            assert "\n" not in sentence

    check()


def member(path: Path, content: bytes, *, times: int = 1) -> None:
    """Write an npz file of one array, whose bytes compress well."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("targets.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(times):
            file.write(content)


@pytest.mark.parametrize("name", ["frontiers.npz", "trace.npz"])
def test_pickles_bombs_and_shapes_of_arrays_are_refused(name, tmp_path, in_time):
    path = tmp_path / name
    np.savez(path, layers=np.array([{}, None], dtype=object), targets=np.array([1]))
    cases = [path.read_bytes()]
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (%s,), }"
    for shape in (b"9" * 12, b"9" * 18, b"-1", b"1e9", b"9" * 4000):
        member(path, (header % shape).ljust(127) + b"\n")
        cases.append(path.read_bytes())
    member(path, b"\0" * (64 << 20), times=80)  # unpacks to 5 GB
    cases.append(path.read_bytes())
    for content in cases:
        path.write_bytes(content)
        with pytest.raises(OfframpError, match=str(path)), in_time():
            STUDY_FILES[name](path)
