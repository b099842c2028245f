"""Folders of runs that several studies share."""

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from offramp.errors import CheckpointError, TrainingError
from offramp.studies import runs
from offramp.studies.runs import new_run, run_all

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
    with new_run(tmp_path, "run") as mine:
        assert sorted(tmp_path.iterdir()) == sorted([mine, alive, other, elsewhere])
        assert (alive / "half").exists()
        (mine / "file").write_text("")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "run", alive, other, elsewhere])


def test_the_first_of_two_that_did_the_same_run_stays(tmp_path):
    target = tmp_path / "run"
    with new_run(tmp_path, "run") as aside:
        target.mkdir()
        (target / "first").write_text("")
        (aside / "second").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "first"]
    (tmp_path / "other").write_text("in the way")
    with (
        pytest.raises(CheckpointError, match="other: cannot be written"),
        new_run(tmp_path, "other"),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]


def test_a_run_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Its files are synced, then its folder, then it is renamed, then the folder above is synced.

    Without that order, a power failure could leave a run with its name and empty files.
    """
    done = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor):
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def watched_rename(path, target):
        done.append((path, target))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    with new_run(tmp_path, "run") as aside:
        (aside / "file").write_text("")
    assert done == [aside / "file", aside, (aside, tmp_path / "run"), tmp_path]


def test_a_run_on_a_full_disk_is_a_sentence_and_leaves_nothing(small_disk):
    expected = pytest.raises(CheckpointError, match="run: cannot be written: No space left")
    with expected, new_run(small_disk, "run") as aside:
        (aside / "file").write_bytes(bytes(1_000_000))
    assert not list(small_disk.iterdir())


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


@dataclass(frozen=True)
class Busybody:
    """A run that also makes the folder of another, as a second command might."""

    name: str
    other: str

    def work(self, folder, *, on_step, should_stop):
        (folder / "by me").write_text("")
        there = folder.parent / self.other
        there.mkdir(exist_ok=True)
        (there / "by another").write_text("")
        return True


def test_a_run_that_another_command_has_done_meanwhile_is_not_done_again(tmp_path):
    done = []
    run_all(
        [Busybody("first", "second"), Busybody("second", "third")],
        tmp_path,
        jobs=1,
        threads=1,
        on_progress=print,
        on_done=done.append,
    )
    assert sorted(done) == ["first", "second"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "first",
        "first/by me",
        "second",
        "second/by another",
    ]


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


def test_a_machine_without_shared_memory_is_a_sentence(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    with pytest.raises(
        TrainingError, match=r"expected shared memory .* /dev/shm on Linux, got: No"
    ):
        run_all([FakeRun("a")], tmp_path, jobs=1, threads=1, on_progress=print, on_done=print)
