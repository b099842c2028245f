"""An output folder is claimed by one process, and written completely or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from offramp.errors import CheckpointError
from offramp.folders import check_free, claimed, locked, new_folder, remove_temporary, working_in


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_claimed_once(tmp_path):
    with claimed(tmp_path / "new" / "run"):
        pass
    check_free(tmp_path / "new" / "run")
    with working_in(tmp_path / "run" / "run.json", {"a": 1}):
        (tmp_path / "run" / "b").write_text("")
    for taken, expected in ((tmp_path / "run", "holds another run"), (__file__, "got a file")):
        with pytest.raises(CheckpointError, match=expected):
            check_free(Path(taken))


def test_a_claim_removes_what_a_killed_process_left(tmp_path):
    (tmp_path / ".run.json.123.tmp").write_text("half")
    with working_in(tmp_path / "run.json", 1):
        assert names(tmp_path) == ["run.json"]


def test_work_that_fails_before_it_has_a_result_leaves_no_folder(tmp_path):
    def fail(done):
        with working_in(tmp_path / "out" / "settings.json", 1):
            (tmp_path / "out" / "runs").mkdir(exist_ok=True)
            if done:
                (tmp_path / "out" / "runs" / "a").write_text("")
            raise RuntimeError

    for done, left in ((False, []), (True, ["out"]), (False, ["out"])):
        with pytest.raises(RuntimeError):
            fail(done)
        assert names(tmp_path) == left


def test_a_run_that_fails_at_once_leaves_no_folder(tmp_path):
    def fail(out):
        with claimed(out):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(tmp_path / "above" / "new")
    assert names(tmp_path) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError):
        fail(tmp_path / "empty")
    assert names(tmp_path) == ["empty"]


def test_two_processes_on_one_folder_are_refused(tmp_path):
    """The second gets a sentence at once, until the first has ended, even by a kill."""
    out = tmp_path / "out"
    hold = f"""
from pathlib import Path
from offramp.folders import claimed
with claimed(Path({str(out)!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline() == b"held\n"
        for use in (claimed, locked, new_folder):
            with pytest.raises(CheckpointError, match="no other process writes to"), use(out):
                pass
        first.kill()
        first.wait()
    with new_folder(out):
        pass


@pytest.mark.parametrize("existing", [False, True])
def test_a_new_folder_is_complete_or_not_there(tmp_path, existing):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    before = names(tmp_path)

    def fail():
        with new_folder(out) as folder:
            (folder / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == before
    with new_folder(out) as folder:
        (folder / "a").write_text("whole")
        assert not out.is_dir() or names(out) == []
    assert names(out) == ["a"]
    assert names(tmp_path) == ["out"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with new_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("whole")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "there") == ["a"]


def test_the_working_folder_is_filled_and_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder(Path()) as folder:
        (folder / "a").write_text("whole")
    assert names(tmp_path) == ["a"]
    (tmp_path / "a").unlink()

    def fail():
        with new_folder(Path()) as folder:
            (folder / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []


def test_the_next_claim_removes_what_a_killed_process_left_beside(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from offramp.folders import new_folder
with new_folder(Path({str(tmp_path / "out")!r})) as folder:
    (folder / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    assert len(names(tmp_path)) == 2
    with new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


def test_a_full_disk_leaves_no_folder(small_disk):
    with (
        pytest.raises(CheckpointError, match="out: cannot be written: No space left on device"),
        new_folder(small_disk / "out") as folder,
    ):
        (folder / "a").write_bytes(bytes(1_000_000))
    assert names(small_disk) == []


def test_temporary_files_are_removed(tmp_path):
    for name in (".a.json.12.tmp", ".tmpdir", "a.tmp", ".keep"):
        (tmp_path / name).write_text("")
    (tmp_path / ".last.tmp").mkdir()
    remove_temporary(tmp_path, tmp_path / "none")
    assert names(tmp_path) == [".keep", ".tmpdir", "a.tmp"]


def test_a_claim_by_a_path_that_goes_back_makes_nothing_else(tmp_path):
    (tmp_path / "other").write_text("")
    with (
        pytest.raises(CheckpointError, match="expected a new or empty folder"),
        claimed(tmp_path / "new" / ".."),
    ):
        pass
    assert names(tmp_path) == ["other"]
