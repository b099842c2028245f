"""A damaged run of the reproduction is a sentence that names the file and the field."""

import json
from dataclasses import asdict, replace

import pytest

from offramp.data import load_corpus
from offramp.errors import CheckpointError
from offramp.studies.reproduce.run import check_kept, load_run
from offramp.studies.reproduce.study import plan_runs


@pytest.mark.parametrize("content", [[], None, {}, {"name": 3}, {"name": "x", "corpus": []}])
def test_a_description_with_wrong_fields_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"run\.json: .*expected"):
        load_run(tmp_path)


def keep(run, folder):
    """Write the description of a finished run."""
    (folder / run.name).mkdir(parents=True)
    about = {
        "name": run.name,
        "corpus": {"name": run.corpus.name, "sha256": run.corpus.sha256},
        "model": replace(run.model, vocab_size=30).stored(),
        "training": asdict(run.training),
        **{"parameters": 1, "train_tokens": 1, "validation_tokens": 1, "unknown_tokens": 0},
        "validations": [],
    }
    (folder / run.name / "run.json").write_text(json.dumps(about))


def test_kept_runs_are_counted_and_must_be_the_same_runs(tmp_path):
    runs = plan_runs(load_corpus("pangram"), 1, device="cpu")
    assert check_kept(runs, tmp_path / "new") == 0
    for run in runs[:2]:
        keep(run, tmp_path)
    assert check_kept(runs, tmp_path) == 2
    others = [
        plan_runs(load_corpus("python-docs"), 1, device="cpu")[0],
        replace(runs[0], training=replace(runs[0].training, lr=2e-3)),
        replace(runs[0], model=replace(runs[0].model, hidden_size=32)),
    ]
    for other in others:
        with pytest.raises(CheckpointError, match="same text, model and training, got another"):
            check_kept([other], tmp_path)
    (tmp_path / runs[0].name / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="the same command does this run anew"):
        check_kept(runs, tmp_path)
