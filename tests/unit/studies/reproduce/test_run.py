"""A damaged run of the reproduction is a sentence that names the file and the field."""

import json

import pytest

from offramp.errors import CheckpointError
from offramp.studies.reproduce.run import load_run


@pytest.mark.parametrize("content", [[], None, {}, {"name": 3}, {"name": "x", "corpus": []}])
def test_a_description_with_wrong_fields_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"run\.json: .*expected"):
        load_run(tmp_path)
