"""study.json: what is read and written anew is the same file."""

import math
from pathlib import Path

import pytest

from offramp.errors import CheckpointError
from offramp.files import write_json
from offramp.reading import read_json
from offramp.report.study_json import read_scale, read_study, read_times, write_study

STUDIES = Path(__file__).parents[3] / "docs" / "studies"


@pytest.mark.parametrize("name", ["heads", "recipe"])
def test_a_stored_study_is_written_as_it_was_read(name, tmp_path):
    path = STUDIES / name / "study.json"
    result = read_study(path)
    write_study(tmp_path / "study.json", result)
    assert (tmp_path / "study.json").read_bytes() == path.read_bytes()
    times = read_times(STUDIES / name / "timing.json")
    write_study(tmp_path / "timing.json", times)
    assert read_json(tmp_path / "timing.json") == read_json(STUDIES / name / "timing.json")
    assert result.rows == result.summary
    assert result.runs[0].frontiers["gain"]["propagate"].threshold[0] == -math.inf
    assert result.rows[0].ppl_at[80].mean > 1


def test_the_stored_study_of_sizes_is_written_as_it_was_read(tmp_path):
    path = STUDIES / "scale" / "study.json"
    result = read_scale(path)
    write_study(tmp_path / "study.json", result)
    assert (tmp_path / "study.json").read_bytes() == path.read_bytes()
    assert result.rows == result.sizes
    assert all(size.to_static.mean < 1 for size in result.sizes)
    write_json(tmp_path / "study.json", {**read_json(path), "sizes": None})
    with pytest.raises(CheckpointError, match=r"sizes: expected .*, got None"):
        read_scale(tmp_path / "study.json")


def test_what_is_no_study_is_named(tmp_path):
    path = tmp_path / "study.json"
    for content, said in (
        ({"study": "x"}, "question: expected a string, but it is missing"),
        ([], "expected an object, got"),
        (
            {**read_json(STUDIES / "alpha" / "study.json"), "compared_at": None},
            "compared_at: expected .*, got None",
        ),
    ):
        write_json(path, content)
        with pytest.raises(CheckpointError, match=said):
            read_study(path)
