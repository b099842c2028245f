"""Where --out leads: links are followed, and a device or a pipe is written to, never replaced."""

import json
import os
import stat

import pytest

COMMANDS = {
    "sweep": ["sweep", "MODEL", "--corpus", "TEXT"],
    "probe": ["probe", "MODEL", "--corpus", "TEXT"],
    "calibrate": ["calibrate", "MODEL", "--corpus", "TEXT", "--epsilon", 0.5],
    "confidence": ["confidence", "MODEL", "--corpus", "TEXT"],
}


@pytest.fixture
def run(request, offramp, trained, tmp_path):
    """Run a command with an --out."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    places = {"MODEL": trained, "TEXT": text}

    def start(name, out):
        return offramp(*(places.get(part, part) for part in COMMANDS[name]), "--out", out)

    return start


@pytest.mark.parametrize("name", COMMANDS)
def test_a_link_is_followed(run, tmp_path, name):
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "folder" / "target.json"
    link.symlink_to(target)
    result = run(name, link)
    assert result.returncode == 0, result.stderr
    assert link.is_symlink()
    assert json.loads(target.read_text())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can replace a device")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_device_is_not_replaced(run, tmp_path, name):
    folder = tmp_path / "devices"
    folder.mkdir()
    os.mknod(folder / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    result = run(name, folder / "null")
    assert result.returncode == 0, result.stderr
    assert stat.S_ISCHR((folder / "null").stat().st_mode)
    assert [path.name for path in folder.iterdir()] == ["null"]


def test_a_pipe_that_nobody_reads_is_refused_and_one_that_is_read_gets_the_figures(run, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = run("sweep", pipe)
    assert result.returncode == 2
    assert "expected a program that reads from this pipe" in result.stderr.splitlines()[-1]
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert run("sweep", pipe).returncode == 0
    assert json.loads(os.read(reader, 1 << 20))
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
def test_a_device_is_no_folder(offramp, checkpoint, tmp_path):
    os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    for command in (
        ["train", "--corpus", "pangram", "--layers", 2, "--steps", 1],
        ["tune", checkpoint, "--corpus", checkpoint / "text.txt"],
        ["export", checkpoint, "--exit", 2],
        ["study", "alpha", "--corpus", "python-docs", "--tokens", 4096],
    ):
        result = offramp(*command, "--out", tmp_path / "null")
        assert result.returncode == 2, result.stderr
        assert "got a file" in result.stderr or "expected a folder" in result.stderr
        assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)
