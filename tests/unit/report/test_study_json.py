"""study.json: what is read and written anew is the same file."""

import math
from pathlib import Path

import pytest

from offramp.errors import CheckpointError
from offramp.files import read_json, write_json
from offramp.report.study_json import from_json, read_study, write_study
from offramp.report.study_result import StudyTimes

STUDIES = Path(__file__).parents[3] / "docs" / "studies"


@pytest.mark.parametrize("name", ["heads", "recipe"])
def test_a_stored_study_is_written_as_it_was_read(name, tmp_path):
    path = STUDIES / name / "study.json"
    result = read_study(path)
    write_study(tmp_path / "study.json", result)
    assert (tmp_path / "study.json").read_bytes() == path.read_bytes()
    times = from_json(StudyTimes, read_json(STUDIES / name / "timing.json"))
    write_study(tmp_path / "timing.json", times)
    assert read_json(tmp_path / "timing.json") == read_json(STUDIES / name / "timing.json")
    assert result.rows == result.summary
    assert result.runs[0].frontiers["gain"]["propagate"].threshold[0] == -math.inf
    assert result.rows[0].ppl_at[80].mean > 1


def test_what_is_no_study_is_named(tmp_path):
    path = tmp_path / "study.json"
    for content, said in (
        ({"study": "x"}, "got one with no 'question'"),
        ([], "expected a file of this version's offramp study"),
        ({**read_json(STUDIES / "alpha" / "study.json"), "compared_at": None}, "got null"),
    ):
        write_json(path, content)
        with pytest.raises(CheckpointError, match=said):
            read_study(path)
