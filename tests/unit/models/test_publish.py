"""What is published says nothing of the machine that it comes from."""

from pathlib import Path

import pytest

from offramp.models.publish import corpus_name, dataset_of, is_place, without_places


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pangram", "pangram"),
        ("python-docs", "python-docs"),
        ("text.txt", "text.txt"),
        ("secret/folder/text.txt", "text.txt"),
        ("/home/me/text.txt", "text.txt"),
        ("~/texts/", "texts"),
        ("../../corpus", "corpus"),
        ("C:\\Users\\me\\text.txt", "text.txt"),
        ("\\\\server\\share\\text.txt", "text.txt"),
        ("file:///home/me/text.txt", "text.txt"),
        ("/", "a local file"),
        ("..", "a local file"),
        ("hf:imdb", "hf:imdb"),
        ("hf:owner/data", "hf:owner/data"),
        ("hf:Salesforce/wikitext/wikitext-2-raw-v1", "hf:Salesforce/wikitext/wikitext-2-raw-v1"),
        ("hf:/home/me/data", "data"),
        ("hf:~/data", "data"),
        ("hf:a/b/c/d", "d"),
    ],
)
def test_a_text_keeps_its_name_and_loses_its_folder(name, expected):
    assert corpus_name(name) == expected


def test_a_local_folder_of_a_dataset_loses_its_folder(tmp_path, monkeypatch):
    (tmp_path / "secret" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert corpus_name("hf:secret/data") == "data"
    assert corpus_name("hf:owner/data") == "hf:owner/data"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:imdb", "imdb"),
        ("hf:Salesforce/wikitext/raw", "Salesforce/wikitext"),
        ("hf:a/b", None),  # a dataset, or a configuration of the dataset a
        ("hf:", None),
        ("hf:a@b", None),
        ("imdb", None),
        ("pangram", None),
    ],
)
def test_only_a_certain_dataset_is_named(name, expected):
    assert dataset_of(name) == expected


def test_every_local_name_in_a_record_loses_its_folder_and_nothing_else_changes(tmp_path):
    (tmp_path / "there").touch()
    record = {
        "format": 1,
        "base": {"id": "owner/name", "folder": "/home/me/models/base"},
        "trained": {
            "corpus": {"name": "secret/text.txt", "sha256": "ab/cd", "read": "whole"},
            "objective": "distill",
            "lr": 0.001,
            "after": [{"exit_layer": 1, "ppl": 3.5}],
            "environment": {"platform": "Linux-6.1-x86_64-with-glibc2.36"},
        },
        "specialised": {"corpus": "secret/other.txt"},
        "tokenizer": "secret/tokenizer.json",
        "policy": {"note": f"see {Path.home()}/notes", "list": [str(tmp_path / "there"), None]},
    }
    found = without_places(record)
    assert found["base"]["folder"] == "base"
    assert found["trained"]["corpus"] == {"name": "text.txt", "sha256": "ab/cd", "read": "whole"}
    assert found["specialised"]["corpus"] == "other.txt"
    assert found["tokenizer"] == "tokenizer.json"
    assert found["policy"] == {"note": "notes", "list": ["there", None]}
    same = ("objective", "lr", "after", "environment")
    assert all(found["trained"][name] == record["trained"][name] for name in same)


@pytest.mark.parametrize("text", ["1=0.3,2=0", "asymmetric:0.5", "float32", "", "a/b", "x" * 5000])
def test_other_text_is_no_place(text):
    assert not is_place(text)
