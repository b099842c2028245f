"""Folders of runs that several studies share."""

import os

import pytest

from offramp.experiments.runs import aside_of, put_in_place

NOBODY = 2**22 + 1  # above the largest process id


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead, alive = tmp_path / f".run.{NOBODY}.tmp", tmp_path / f".run.{os.getppid()}.tmp"
    other = tmp_path / f".other.{NOBODY}.tmp"
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "half").write_text("")
    mine = aside_of(tmp_path, "run")
    assert sorted(tmp_path.iterdir()) == sorted([mine, alive, other])
    assert (alive / "half").exists()
    (mine / "file").write_text("")
    assert not list(aside_of(tmp_path, "run").iterdir())  # begun anew


def test_the_first_of_two_that_did_the_same_run_stays(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    (target / "first").write_text("")
    aside = aside_of(tmp_path, "run")
    (aside / "second").write_text("")
    put_in_place(aside, target)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "first"]
    aside = aside_of(tmp_path, "other")
    (tmp_path / "other").write_text("in the way")
    with pytest.raises(OSError, match="other"):
        put_in_place(aside, tmp_path / "other")
