"""Links inside a corpus: each file is read once, and what leads outside the folder is not read."""

import os
import socket
import warnings

import pytest

from offramp.data import load_corpus
from offramp.errors import CorpusError, OfframpWarning


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "corpus"
    (made / "sub").mkdir(parents=True)
    (made / ".kept").mkdir()
    (made / "b.txt").write_text("two")
    (made / "sub" / "c.txt").write_text("three")
    (made / ".kept" / "d.txt").write_text("four")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "e.txt").write_text("other")
    return made


def test_a_file_with_several_names_is_read_once(folder):
    plain = load_corpus(str(folder))
    (folder / "a.txt").symlink_to("b.txt")
    (folder / "again").symlink_to("sub")
    (folder / "sub" / "up").symlink_to("..")
    linked = load_corpus(str(folder))
    assert linked.whole == plain.whole == "two\nthree"
    assert linked.sha256 == plain.sha256


def test_links_to_what_has_no_other_visible_name_are_followed(folder):
    (folder / "a.txt").symlink_to(".kept/d.txt")
    assert load_corpus(str(folder)).whole == "four\ntwo\nthree"
    (folder / "a.txt").unlink()
    (folder / "z").symlink_to(".kept")
    (folder / ".kept" / "round").symlink_to("../z")
    assert load_corpus(str(folder)).whole == "two\nthree\nfour"


def test_links_that_lead_outside_are_skipped_and_counted_in_one_warning(folder):
    (folder / "a.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "x").symlink_to(folder.parent / "other")
    (folder / "gone").symlink_to("nowhere")
    (folder / "round").symlink_to("round")
    with pytest.warns(OfframpWarning, match="4 links lead outside it or nowhere") as said:
        assert load_corpus(str(folder)).whole == "two\nthree"
    assert len(said) == 1


def test_a_folder_of_nothing_but_links_outside_says_so(tmp_path, folder):
    links = tmp_path / "links"
    links.mkdir()
    (links / "a.txt").symlink_to(folder / "b.txt")
    with pytest.raises(CorpusError, match="got one without; 1 link leads outside it"):
        load_corpus(str(links))
    (links / "train.txt").symlink_to(folder / "b.txt")
    with pytest.raises(
        CorpusError, match=r"train.txt in the folder, got a link that leads outside"
    ):
        load_corpus(str(links))


def test_the_folder_itself_may_be_a_link(tmp_path, folder):
    (tmp_path / "link").symlink_to(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_corpus(str(tmp_path / "link")).whole == "two\nthree"


def test_pipes_devices_and_sockets_are_not_read(folder, monkeypatch):
    os.mkfifo(folder / "pipe")
    (folder / "null").symlink_to("/dev/zero")
    (folder / "to-pipe").symlink_to("pipe")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.warns(OfframpWarning, match="1 link leads outside it"):
            assert load_corpus(str(folder)).whole == "two\nthree"
    for name in (folder / "pipe", folder / "socket", "/dev/zero", "/dev/null"):
        with pytest.raises(CorpusError, match="got a pipe or a device"):
            load_corpus(str(name))


def test_the_command_says_in_one_line_what_it_skips(folder, tmp_path, capsys):
    from offramp.cli import main

    (folder / "a\x1b[31m.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "train-this").write_text("the quick brown fox " * 200)
    arguments = ("--layers", 1, "--dim", 8, "--heads", 2, "--seq-len", 8, "--batch-size", 2)
    main(
        [
            *map(str, ("train", "--corpus", folder, "--steps", 1, *arguments)),
            *("--tracker", "none", "--out", str(tmp_path / "model")),
        ]
    )
    said = [line for line in capsys.readouterr().err.splitlines() if "outside" in line]
    assert len(said) == 1
    assert said[0].startswith("offramp: ")
