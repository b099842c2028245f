"""What the hub or its names do not allow is one sentence, and nothing is half done."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, push, refused, same

import offramp as library
from offramp.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("part", "status", "expected"),
    [
        ("POST /api/repos/create", 401, "expected a token with which the hub lets you write"),
        ("/preupload/", 401, "log in with: hf auth login"),
        ("POST /api/repos/create", 403, "expected a token that may write there"),
        ("/commit/", 403, "got one that may not"),
        ("/commit/", 404, "expected an owner and a branch that the hub has"),
        ("/commit/", 412, "somebody else changed it meanwhile"),
        ("/commit/", 500, "refused the upload with status 500"),
        ("/commit/", 413, "refused the upload with status 413"),
        ("/commit/", 0, "the upload broke off"),
    ],
)
def test_what_the_hub_refuses_is_a_sentence(offramp, hub, trained, part, status, expected):
    hub.fail[part] = status
    refused(offramp("push", trained, "me/model"), "me/model", expected)
    assert all(len(each.commits) == 1 for each in hub.repositories.values())


def test_an_upload_that_breaks_off_commits_nothing_and_can_be_repeated(
    offramp, hub, trained, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail["PUT /upload/"] = 0
    refused(offramp("push", trained, "me/model"), "the upload broke off", "push it again")
    assert len(hub.repositories["me/model"].commits) == 1
    hub.fail.clear()
    push(offramp, trained, "me/model")
    same(library.load("me/model"), library.load(trained))


def test_ctrl_c_in_an_upload_commits_nothing(offramp, hub, trained, monkeypatch):
    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.preupload_lfs_files", interrupt)
    assert offramp("push", trained, "me/model").returncode == 130
    assert len(hub.repositories["me/model"].commits) == 1


def test_no_token_or_a_wrong_one_is_a_sentence(offramp, hub, trained, monkeypatch):
    with pytest.raises(CheckpointError, match="hf auth login"):
        library.load(trained).push_to_hub("me/model", token="hf_wrong")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    result = offramp("push", trained, "me/model")
    refused(result, "hf auth login")
    assert "hf_wrong" not in result.stderr
    refused(offramp("push", trained, "nobody/model"), "hf auth login")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused(offramp("push", trained, "nobody/model"), "expected an owner and a branch")
    assert hub.repositories == {}


def test_a_private_push_to_a_public_repository_is_refused(offramp, hub, trained):
    push(offramp, trained, "me/public")
    before = dict(hub.repositories["me/public"].branches)
    refused(offramp("push", trained, "me/public", "--private"), "expected a private repository")
    assert hub.repositories["me/public"].branches == before


@pytest.mark.parametrize(
    "name",
    [
        *("a/b/c", "", " ", "me/..", "me/a b", "me/a--b", "me/m.git", "../x", "me/m@", "me/m@../x"),
        *("https://huggingface.co/me/m", "me/\x1b[2J", "é/ü", "me/" + "x" * 5000, "me/m@a@b"),
    ],
)
def test_a_malformed_name_is_a_sentence(offramp, hub, trained, name):
    refused(offramp("push", trained, name), "name: expected OWNER/NAME")
    assert hub.calls == []


@pytest.mark.parametrize("name", [None, 5, b"me/m", Path("me/m")])
def test_a_name_of_another_type_is_a_sentence(trained, name):
    with pytest.raises(ConfigError, match="name: expected OWNER/NAME"):
        library.load(trained).push_to_hub(name)


def test_without_a_network_a_push_is_a_sentence_and_a_load_uses_the_cache(
    offramp, hub, trained, monkeypatch
):
    push(offramp, trained, "me/model")
    expected = library.load("me/model").sha256
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert library.load("me/model").sha256 == expected == library.load(trained).sha256
    refused(offramp("push", trained, "me/model"), "HF_HUB_OFFLINE is set")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(offramp("push", trained, "me/model"), "http://127.0.0.1:9", "it does not answer")
    refused(offramp("generate", "me/other", "x"), "since the Hugging Face hub cannot be reached")


def test_unknown_options_and_empty_words_are_sentences(offramp, hub, trained):
    lm = library.load(trained)
    with pytest.raises(
        ConfigError, match="privat: expected the name of an option, perhaps private"
    ):
        lm.push_to_hub("me/m", privat=True)
    with pytest.raises(ConfigError, match="private"):
        lm.push_to_hub("me/m", private="yes")
    refused(offramp("push", trained, "me/m", "--message", " "), "commit_message: expected text")
    refused(offramp("push", trained, "me/m", "--license", "a\nb"), "license: expected the name")
    refused(offramp("push", "no-such-folder/x/y", "me/m"), "found none")
    assert hub.calls == []


def test_a_newer_format_is_a_sentence_and_an_older_one_loads(
    offramp, hub, frozen, trained, monkeypatch, tmp_path
):
    newer = shutil.copytree(frozen, tmp_path / "newer")
    about = json.loads((newer / "offramp.json").read_text())
    about["base"] |= {"id": about["base"]["folder"]}
    for wrong, words in {
        2: "of a format up to 1, got format 2, which a newer offramp wrote",
        0: "of format 1, got 0",
        True: "of format 1, got True",
        "1": "of format 1, got '1'",
    }.items():
        (newer / "offramp.json").write_text(json.dumps({**about, "format": wrong}))
        refused(offramp("generate", newer, "7"), words)
    (newer / "offramp.json").write_text(json.dumps({**about, "format": 1}))
    monkeypatch.setattr("offramp.models.huggingface.exits_file.FORMAT", 2)
    assert library.load(newer).sha256 == library.load(frozen).sha256
    monkeypatch.setattr("offramp.models.native.checkpoint.FORMAT", 2)
    library.load(trained)


def test_a_token_in_the_environment_is_enough_and_is_never_shown(hub, trained):
    assert os.environ["HF_TOKEN"] == TOKEN
    assert TOKEN not in repr(library.load(trained).push_to_hub("me/model"))
