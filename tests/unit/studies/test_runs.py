"""Folders of runs that several studies share."""

import os
import signal
import socket
import time
from dataclasses import dataclass

import pytest

from offramp.errors import TrainingError
from offramp.studies import runs
from offramp.studies.runs import aside_of, put_in_place, run_all

NOBODY = 2**22 + 1  # above the largest process id


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    here = socket.gethostname()
    dead = tmp_path / f".run.{here}.{NOBODY}.tmp"
    alive = tmp_path / f".run.{here}.{os.getppid()}.tmp"
    other = tmp_path / f".other.{here}.{NOBODY}.tmp"
    elsewhere = tmp_path / f".run.another.host.{NOBODY}.tmp"  # alive there, for all we know
    for folder in (dead, alive, other, elsewhere):
        folder.mkdir()
        (folder / "half").write_text("")
    mine = aside_of(tmp_path, "run")
    assert sorted(tmp_path.iterdir()) == sorted([mine, alive, other, elsewhere])
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


@dataclass(frozen=True)
class FakeRun:
    """Does what it is told to."""

    name: str

    def work(self, folder, *, on_step, should_stop):
        if self.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while self.name == "late" and not should_stop():
            time.sleep(0.01)
        (folder / "file").write_text("")
        return self.name != "stopped"


def all_of(names, folder):
    done = []
    runs = [FakeRun(name) for name in names]
    run_all(runs, folder, jobs=1, threads=1, on_progress=lambda _: None, on_done=done.append)
    return done


def test_a_killed_worker_is_said_in_a_sentence_and_what_is_done_stays(tmp_path):
    with pytest.raises(TrainingError, match="one was killed"):
        all_of(["first", "killed"], tmp_path)
    assert [path.name for path in tmp_path.glob("f*")] == ["first"]
    assert all_of(["first", "second"], tmp_path) == ["first", "second"]


def test_a_run_that_stopped_half_way_is_dropped(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        all_of(["first", "stopped"], tmp_path)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["first"]


def test_what_is_whole_when_the_stop_comes_is_kept(tmp_path):
    def interrupt(name):
        raise KeyboardInterrupt

    runs = [FakeRun(name) for name in ("late", "first")]
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, tmp_path, jobs=2, threads=1, on_progress=lambda _: None, on_done=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "late"]


@pytest.mark.parametrize(("threads", "jobs"), [(1, 6), (2, 3), (4, 1), (9, 1)])
def test_jobs_are_one_for_each_core_that_the_process_may_use(monkeypatch, threads, jobs):
    monkeypatch.setattr(runs.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(runs.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert runs.default_jobs(threads) == jobs
    monkeypatch.delattr(runs.os, "sched_getaffinity")
    assert runs.default_jobs(threads) == 64 // threads
