"""Files of a run that are damaged: a sentence that names the file."""

import json

import numpy as np
import pytest

from offramp.errors import CheckpointError
from offramp.evaluation.trace import ExitTrace
from offramp.studies.study.frontier import load_frontiers
from offramp.studies.study.record import RunRecord, RunTiming

RECORD = RunRecord(
    label="half",
    config={"seed": 1},
    train_tokens=10,
    test_tokens=5,
    exit_ppl={1: 3.0, 2: 2.0},
    flops={"full": 7.0, "gain gate": 1.0},
    left_at_budget={1: 0.5},
    validations=[{"step": 1}],
)
TIMING = RunTiming(
    seconds={"train": 1.0},
    passes={"full": [2.0], "max_prob": [1.0]},
    environment={"os": 1},
)


@pytest.mark.parametrize("value", [RECORD, TIMING])
def test_what_is_saved_is_read(tmp_path, value):
    value.save(tmp_path)
    assert type(value).load(tmp_path) == value


@pytest.mark.parametrize(("value", "name"), [(RECORD, "run.json"), (TIMING, "timing.json")])
@pytest.mark.parametrize("wrong", [{}, [], None, 5, "x", {"flops": [], "passes": {"full": 1}}])
def test_another_content_is_refused(tmp_path, value, name, wrong):
    (tmp_path / name).write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match=rf"{name}: (\S+: )?expected"):
        type(value).load(tmp_path)


@pytest.mark.parametrize(("value", "name"), [(RECORD, "run.json"), (TIMING, "timing.json")])
def test_a_field_of_another_kind_is_refused(tmp_path, value, name):
    value.save(tmp_path)
    path = tmp_path / name
    content = json.loads(path.read_text())
    for field in content:
        for wrong in ([5], "x", 5):
            if field == "label":  # any text
                continue
            path.write_text(json.dumps(content | {field: wrong}))
            if field.endswith("tokens") and wrong == 5:
                continue
            with pytest.raises(CheckpointError, match=name):
                type(value).load(tmp_path)


@pytest.mark.parametrize("load", [load_frontiers, ExitTrace.load])
def test_damaged_arrays_are_refused(tmp_path, load):
    path = tmp_path / "arrays.npz"
    with pytest.raises(CheckpointError, match=r"arrays\.npz"):
        load(path)
    np.savez(path, other=np.zeros(3))
    whole = path.read_bytes()
    for content in (b"", b"junk", b"PK\x03\x04junk", whole, whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"arrays\.npz"):
            load(path)
