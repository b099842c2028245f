"""Read Hugging Face datasets as texts, and work offline if the hub cannot be reached.

The hub's clients retry an unreachable host for most of a minute and log each attempt. Therefore
one short request tests the connection first; if it fails, only local files are used.
"""

import json
import logging
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

from offramp.data.text import Text
from offramp.errors import CorpusError

PREFIX = "hf:"
COLUMN = "text"
_ANSWER_SECONDS = 5.0
_ROWS = 1000
_LONGEST = 1000  # characters of a library's message


def dataset_splits(name: str) -> dict[str, Text]:
    """Return the splits of ``hf:PATH[/CONFIG]`` as texts: the rows of the column ``text``.

    A line break is added to a row that does not end in one. PATH is a dataset on the hub, a
    folder written by ``save_to_disk``, or a folder with files that ``datasets`` reads
    (``train.csv``, ``test.jsonl``, ...). A dataset without splits becomes one split ``train``.
    """
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise CorpusError(
            f"{name}: expected the library that reads datasets, which is not installed; "
            "pip install 'offramp[hf]'"
        ) from None
    loaded = _load(name)
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return {str(split): _rows(name, str(split), rows) for split, rows in splits.items()}


def hub_reachable() -> bool:
    """Return whether the hub answers within a few seconds; False if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []
    request = threading.Thread(
        target=lambda: answers.append(_answers(constants.ENDPOINT)), daemon=True
    )
    request.start()
    request.join(_ANSWER_SECONDS)  # a name server may be slower than any timeout of urlopen
    return answers == [True]


def _answers(address: str) -> bool:
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.urlopen(request, timeout=_ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # an HTTP error is an answer
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the clients may have more certificates
    except OSError:
        return False
    return True


@contextmanager
def offline() -> Iterator[None]:
    """Make the hub's clients use only local files."""
    from huggingface_hub import constants

    modules: list[Any] = [constants]
    if "datasets" in sys.modules:
        modules.append(sys.modules["datasets"].config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def one_line(error: BaseException) -> str:
    """Return the message of a library's error on one line, without a stack of C++ and not long."""
    said = " ".join(str(error).partition("Exception raised from")[0].split())
    said, kind = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}...", type(error).__name__
    return f"{kind}: {said}" if isinstance(error, KeyError) else said or kind


def _load(name: str) -> Any:
    """Load a ``Dataset``, or a dict of them by split."""
    import datasets

    path = name.removeprefix(PREFIX)
    if path and Path(path).is_dir():
        with _reading(name):
            saved = _saved(Path(path))
            return datasets.load_dataset(path) if saved is None else saved
    if not path or path.startswith((".", "/", "~")):
        raise CorpusError(f"{name}: expected {PREFIX}DATASET or {PREFIX}FOLDER; no such folder")
    reachable = hub_reachable()
    with nullcontext() if reachable else offline():
        for repository, config in _readings(path):
            try:
                return datasets.load_dataset(repository, config)
            except (FileNotFoundError, ConnectionError):  # not on the hub; not on this machine
                continue
            except Exception as error:
                raise CorpusError(f"{name}: expected a dataset, got: {one_line(error)}") from None
    if reachable:
        raise CorpusError(
            f"{name}: expected {PREFIX}DATASET or {PREFIX}DATASET/CONFIG on the Hugging Face hub "
            "or on disk; there is no such dataset, or it is not public"
        )
    raise CorpusError(
        f"{name}: expected a dataset that is on this machine, since the Hugging Face hub cannot "
        f"be reached; got none of this name; use a text file, a folder with train.txt and "
        f"valid.txt, or {PREFIX}FOLDER of a dataset saved with save_to_disk"
    )


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Raise the errors of ``datasets`` as a CorpusError with their causes; print nothing else."""
    import datasets

    log, said = logging.getLogger("datasets"), _Messages()
    before, datasets_bars = (log.handlers, log.propagate), datasets.is_progress_bar_enabled()
    log.handlers, log.propagate = [said], False
    datasets.disable_progress_bars()
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:  # each file format raises its own errors
        causes = [one_line(error)]
        while (cause := error.__cause__ or error.__context__) is not None:
            error = cause  # type: ignore[assignment]
            causes.append(one_line(error))
        whole = ": ".join(dict.fromkeys([causes[0], *(said.errors[-1:] or causes[-1:])]))
        raise CorpusError(f"{name}: expected a readable dataset, got: {whole}") from None
    finally:
        log.handlers, log.propagate = before
        if datasets_bars:
            datasets.enable_progress_bars()


class _Messages(logging.Handler):
    """Keeps the errors that a library logs: they name the file, which the exception may not."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(" ".join(record.getMessage().split()))


def _saved(folder: Path) -> Any:
    """Load a folder written by ``save_to_disk``; None if it is not one."""
    import datasets

    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return {split: _saved(folder / split) for split in splits}
    if not (folder / "state.json").is_file():
        return None
    if not json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
        no_rows = datasets.Features(
            {COLUMN: datasets.Value("string")}
        )  # datasets cannot read what it saved
        return datasets.Dataset.from_dict({COLUMN: []}, features=no_rows)
    return datasets.load_from_disk(str(folder))


def _readings(path: str) -> list[tuple[str, str | None]]:
    """Return what ``a/b`` may mean: dataset b of owner a, or dataset a with configuration b."""
    parts = path.split("/")
    owned = [("/".join(parts[:2]), "/".join(parts[2:]) or None)]
    return [*owned, (parts[0], parts[1])] if len(parts) == 2 else owned


def _rows(name: str, split: str, rows: Any) -> Text:
    def pieces() -> Iterator[str]:
        _check_column(name, split, rows.features)
        with _reading(name):
            texts_only = rows.select_columns(COLUMN).with_format(None)
            batches = iter(texts_only.iter(_ROWS))
        for index in count():
            with _reading(name):
                batch = next(batches, None)
            if batch is None:
                return
            texts = batch[COLUMN]
            if None in texts:
                raise CorpusError(
                    f"{name}: expected text in every row of the split {split}, "
                    f"got none in row {index * _ROWS + texts.index(None) + 1}"
                )
            yield "".join(text if text.endswith("\n") else text + "\n" for text in texts)

    return Text(pieces)


def _check_column(name: str, split: str, columns: Mapping[str, Any]) -> None:
    if COLUMN not in columns:
        raise CorpusError(
            f"{name}: expected a column {COLUMN!r} in the split {split}, "
            f"got the columns {', '.join(columns)}"
        )
    kind = getattr(columns[COLUMN], "dtype", type(columns[COLUMN]).__name__)
    if kind not in ("string", "large_string"):
        raise CorpusError(f"{name}: expected strings in the column {COLUMN!r}, got {kind}")
