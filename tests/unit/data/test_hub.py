"""Hugging Face datasets, offline; what needs the hub is replaced."""

import http.server
import sys
import threading
import time

import pytest

from offramp.data import hub, load_corpus, stream_corpus
from offramp.errors import CorpusError

datasets = pytest.importorskip("datasets")

TRAIN = [" = Title = \n", "", " text \u00e9 . \n", "no line break"]


@pytest.fixture(autouse=True)
def away_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def saved(folder, **splits):
    tables = {
        split: datasets.Dataset.from_dict(
            rows if isinstance(rows, dict) else {"text": rows},
            features=None if isinstance(rows, dict) else TEXT,
        )
        for split, rows in splits.items()
    }
    datasets.DatasetDict(tables).save_to_disk(str(folder))
    return f"hf:{folder}"


TEXT = datasets.Features({"text": datasets.Value("string")})


@pytest.mark.parametrize("validation", ["validation", "valid", "dev"])
def test_a_saved_dataset_has_its_named_splits(tmp_path, validation):
    name = saved(tmp_path / "d", train=TRAIN, test=["c"], extra={"x": [1]}, **{validation: ["b\n"]})
    corpus = load_corpus(name)
    assert corpus.name == name
    assert corpus.train == " = Title = \n\n text \u00e9 . \nno line break\n"
    assert (corpus.validation, corpus.test) == ("b\n", "c\n")
    assert corpus.split == (
        f"the split train trains, {validation} validates, test is kept for testing"
    )


def test_rows_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_ROWS", 2)
    corpus = stream_corpus(saved(tmp_path / "d", train=TRAIN, validation=["b"]))
    assert list(corpus.train) == [" = Title = \n\n", " text \u00e9 . \nno line break\n"]


def test_a_dataset_without_validation_is_parted_by_position_and_that_is_said(tmp_path):
    datasets.Dataset.from_dict({"text": ["123456789"]}).save_to_disk(str(tmp_path / "d"))
    corpus = load_corpus(f"hf:{tmp_path / 'd'}")
    assert (corpus.train, corpus.validation) == ("123456789", "\n")
    assert "first 90% of the characters of the split train" in corpus.split


def test_a_folder_of_data_files_is_read(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").write_text("text,other\nhello,1\n")
    (tmp_path / "d" / "test.csv").write_text("text,other\nbye,1\n")
    corpus = load_corpus(f"hf:{tmp_path / 'd'}")
    assert (corpus.train + corpus.validation, corpus.test) == ("hello\n", "bye\n")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": TRAIN, "validation": []}, "expected text in the split validation, got none"),
        ({"train": ["", " "], "validation": ["a"]}, "expected text in the split train, got none"),
        ({"test": ["a"], "dev": ["a"]}, "expected a split train, got dev, test"),
        (
            {"train": {"a": ["x"], "b": [1]}},
            "a column 'text' in the split train, got the columns a, b",
        ),
        ({"train": {"text": [1, 2]}}, "expected strings in the column 'text', got int64"),
        ({"train": {"text": [["a"]]}}, "expected strings in the column 'text', got List"),
        ({"train": ["a", None, "b"]}, "in every row of the split train, got none in row 2"),
    ],
)
def test_datasets_that_are_no_corpus_are_refused(tmp_path, splits, message):
    name = saved(tmp_path / "d", **splits)
    with pytest.raises(CorpusError) as caught:
        load_corpus(name)
    assert message in str(caught.value)
    assert str(caught.value).startswith(name)


def refused(name):
    start = time.perf_counter()
    with pytest.raises(CorpusError) as caught:
        load_corpus(name)
    assert time.perf_counter() - start < 10
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(name)
    return str(caught.value)


NAMES = ["hf:wikitext/wikitext-2-raw-v1", "hf:Salesforce/wikitext/wikitext-2-raw-v1", "hf:none"]


@pytest.mark.parametrize("name", NAMES)
def test_offline_a_hub_name_is_refused_at_once_and_says_what_can_be_used(name):
    message = refused(name)
    assert "cannot be reached" in message
    assert "a folder with train.txt and valid.txt" in message
    assert "save_to_disk" in message


@pytest.mark.parametrize("name", NAMES[:1])
def test_so_it_is_where_nothing_answers(name, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(name)
    assert caplog.text == ""  # the clients' retries are
    assert not datasets.config.HF_HUB_OFFLINE  # as before


@pytest.mark.parametrize("name", ["hf:", "hf:/no/such/folder", "hf:./none", "hf:a b", "hf:a//b"])
def test_what_is_no_name_is_refused(name):
    refused(name)


def test_a_name_on_the_hub_is_read_as_owner_and_dataset_then_as_dataset_and_config(monkeypatch):
    asked = []

    def load(path, config):
        asked.append((path, config))
        if (path, config) == ("wikitext", "raw"):
            return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["0123456789"]}))
        raise datasets.exceptions.DatasetNotFoundError(path)

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_corpus("hf:wikitext/raw").whole == "0123456789\n"
    assert asked == [("wikitext/raw", None), ("wikitext", "raw")]
    asked.clear()
    assert "there is no such dataset" in refused("hf:owner/wikitext/raw")
    assert asked == [("owner/wikitext", "raw")]


def test_what_the_library_says_is_passed_on_in_one_line(monkeypatch):
    def load(path, config):
        raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']")

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert "Config name is missing. Please pick one among: ['a', 'b']" in refused("hf:owner/name")


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'offramp[hf]'" in refused("hf:wikitext/wikitext-2-raw-v1")


@pytest.mark.parametrize("status", [200, 404, 405])
def test_a_hub_that_answers_anything_is_reachable(monkeypatch, status):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.handle_request).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    assert not hub.hub_reachable()  # never asked offline
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert hub.hub_reachable()
    server.server_close()
    assert not hub.hub_reachable()


def test_a_hub_that_never_answers_is_given_up_on(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_ANSWER_SECONDS", 0.1)
    done = threading.Event()
    monkeypatch.setattr(hub, "_answers", lambda address: done.wait(20))
    start = time.perf_counter()
    assert not hub.hub_reachable()
    assert time.perf_counter() - start < 5
    done.set()


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        ("train.jsonl", '{"text": "good"}\n{"text": "bad\n', "JSON parse error"),
        ("train.jsonl", '{"text": "good"}\nno json at all\n', "JSON parse error"),
        ("train.parquet", "PAR1 no parquet", "[Pp]arquet"),
    ],
)
def test_a_broken_file_is_named_with_the_cause(tmp_path, file, content, cause, capfd):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / file).write_text(content)
    with pytest.raises(CorpusError, match=cause) as error:
        load_corpus(f"hf:{tmp_path / 'd'}")
    assert "\n" not in str(error.value)
    assert file in str(error.value)
    assert capfd.readouterr().err == ""  # neither bars nor a log


def test_rows_that_cannot_be_read_are_one_sentence(tmp_path):
    saved(tmp_path / "d", train=["some text"] * 50)
    [data] = (tmp_path / "d").rglob("*.arrow")
    content = bytearray(data.read_bytes())
    content[8:] = content[:-8]
    data.write_bytes(content)
    with pytest.raises(CorpusError, match="expected a readable dataset, got"):
        load_corpus(f"hf:{tmp_path / 'd'}")
