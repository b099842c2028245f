"""The files of a model that are published, without what they say of this machine.

These are the model's own files and nothing else: no checkpoints, logs, metrics or hidden files, and
no file that a link brings in from elsewhere. Names of local files in them (of texts, tokenizers and
backbones) lose their folders.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.errors import CheckpointError
from offramp.models.fitted import FITTED_FILE
from offramp.models.hub_names import hub_name
from offramp.models.huggingface.adapter import CONFIG_FILE, WEIGHTS_FILE
from offramp.models.huggingface.exits_file import EXITS_FILE, EXITS_JSON, read_exits
from offramp.models.model_files import ModelFiles
from offramp.models.sources import DEMO
from offramp.reading import read_json
from offramp.schema import shown

INDEX = "model.safetensors.index.json"
_TEXTS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
    *("merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
"""Files beside the weights that a tokenizer or ``generate`` of transformers reads."""
_CLEANED = ("config.json", "tokenizer_config.json", "generation_config.json")
_PLACES = (
    *("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file"),
    *("vocab_file", "merges_file"),
)
"""Fields in which transformers writes where a file was."""
_CORPORA = ("pangram", "python-docs")
_LOCAL = re.compile(r"\s*(/|~|\.\.?([/\\]|$)|\\\\|[A-Za-z]:[\\/]|file:)")
_SEPARATOR = re.compile(r"[/\\]")
DATASET = "hf:"
_DATASET = re.compile(r"hf:[\w.-]+(/[\w.-]+){0,2}")


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file of a model on the hub."""

    name: str
    content: Path | bytes
    "Where it is, or its bytes if they differ from those on the disk."


def published_files(files: ModelFiles) -> list[PublishedFile]:
    """Return the files of a model that go to the hub, by name.

    Exits of a backbone elsewhere go without the backbone. Raises CheckpointError for a folder that
    offramp did not write, for a backbone that only this machine has, and for a link that leads
    out of the folder.
    """
    own = files.own
    if own is None or files.kind == "checkpoint":
        raise CheckpointError(
            f"{files.name}: expected a folder that offramp train, tune, specialise, quantise or "
            "save wrote, got a checkpoint without exits; hf upload uploads it"
        )
    found: dict[str, Path | bytes] = {}
    for name in (*_TEXTS, FITTED_FILE):
        if (own / name).is_file():
            found[name] = own / name
    if files.adapted:
        found[CONFIG_FILE] = _adapter_config(files, own / CONFIG_FILE)
        found[WEIGHTS_FILE] = own / WEIGHTS_FILE
    elif files.kind == "native" or files.holds_backbone:
        found["config.json"] = own / "config.json"
        for path in files.backbone.weights:
            found[path.name] = own / path.name
        if (own / INDEX).is_file() and "model.safetensors" not in found:
            found[INDEX] = own / INDEX
    for name, content in found.items():
        refuse_link(own / name, own)
        if name in _CLEANED and isinstance(content, Path):
            found[name] = _cleaned(content, native=files.kind == "native")
    if files.kind == "exits":
        refuse_link(own / EXITS_FILE, own)
        found[EXITS_FILE] = own / EXITS_FILE
        found[EXITS_JSON] = _bytes(_about_exits(files, found.get(CONFIG_FILE)))
    return [PublishedFile(name=name, content=found[name]) for name in sorted(found)]


def published_base(base: Mapping[str, Any]) -> bool:
    """Whether ``base`` of ``offramp.json`` names a model that others can get, not a folder."""
    name = base["id"]
    return name == DEMO or (hub_name(name) is not None and not Path(name).is_dir())


def _adapter_config(files: ModelFiles, path: Path) -> Path | bytes:
    """Return an adapter's config that names its backbone on the hub."""
    stored, name = read_json(path), files.about["base"]["id"]
    if not isinstance(stored, dict) or stored.get("base_model_name_or_path") == name:
        return path
    return _bytes({**stored, "base_model_name_or_path": name})


def _about_exits(files: ModelFiles, adapter: Path | bytes | None) -> dict[str, Any]:
    """Return ``offramp.json`` with the name of the backbone on the hub, and no local names."""
    assert files.own is not None
    about = without_places(read_exits(files.own))
    base = {name: value for name, value in about["base"].items() if name != "folder"}
    source = files.backbone
    if files.adapted:
        if not published_base(base):
            raise CheckpointError(
                f"{files.name}: expected an adapter whose backbone is on the hub, so that others "
                f"can load it, got {shown(base['id'])}; lm.save writes the whole model, merged"
            )
        if isinstance(adapter, bytes):
            base["adapter_config_sha256"] = hashlib.sha256(adapter).hexdigest()
    elif files.holds_backbone:
        base["id"] = "."
    elif source.revision is not None:
        base |= {"id": source.id, "revision": source.revision}
    elif source.packaged is not None:
        base["id"] = DEMO
    else:
        raise CheckpointError(
            f"{files.name}: expected exits whose backbone is on the hub, so that others can load "
            f"them, got {source.id}, a folder of this machine; if the hub has it, name it: --base "
            "OWNER/NAME"
        )
    return {**about, "base": base}


def refuse_link(path: Path, own: Path) -> None:
    """Refuse a file that a link brings in from elsewhere; those of the hub's cache are its own."""
    target = path.resolve()
    blobs = target.parent
    cached = blobs.name == "blobs" and blobs.parent.name.startswith("models--")
    if not (cached or target.is_relative_to(own.resolve())):
        raise CheckpointError(
            f"{path}: expected a file of the model to upload, got a link to {target}; replace it "
            "by the file itself"
        )


def _cleaned(path: Path, *, native: bool) -> Path | bytes:
    """Return a file of JSON without local places; the file itself if it has none."""
    stored = read_json(path)
    if not isinstance(stored, dict):
        return path
    own = native and path.name == "config.json"
    new = without_places(stored) if own else _without_fields(stored)
    return path if new == stored else _bytes(new)


def _bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _without_fields(content: Any) -> Any:
    """Return a file of transformers without fields that say where a file was on this machine."""
    if isinstance(content, dict):
        return {
            name: _without_fields(value)
            for name, value in content.items()
            if not (name in _PLACES and isinstance(value, str) and is_place(value))
        }
    return [_without_fields(value) for value in content] if isinstance(content, list) else content


def without_places(content: Any) -> Any:
    """Return what offramp stored, where local names of texts and files lose their folders."""
    if isinstance(content, dict):
        return {name: _field(name, value) for name, value in content.items()}
    if isinstance(content, list):
        return [without_places(value) for value in content]
    return _last_part(content) if isinstance(content, str) and is_place(content) else content


def _field(name: object, value: Any) -> Any:
    """Return a field of what offramp stored without local places."""
    if name == "corpus" and isinstance(value, dict):
        return {
            key: _field("corpus" if key == "name" else key, part) for key, part in value.items()
        }
    if name == "corpus" and isinstance(value, str):
        return corpus_name(value)
    if name == "tokenizer" and isinstance(value, str) and value.endswith(".json"):
        return _last_part(value)
    return without_places(value)


def is_place(text: str) -> bool:
    """Whether a text is the path of a file: an absolute one, or one that this machine has."""
    if _LOCAL.match(text) or _LOCAL.match(text.removeprefix(DATASET)):
        return True
    try:
        there = bool(_SEPARATOR.search(text)) and Path(text.removeprefix(DATASET)).exists()
    except (OSError, ValueError):  # a text that can be no path
        return False
    return there or (len(text) < 300 and str(Path.home()) not in ("/", "") and _at_home(text))


def _at_home(text: str) -> bool:
    return f"{Path.home()}/" in text


def corpus_name(name: str) -> str:
    """Return the name of a text without its folder; those of datasets on the hub stay whole."""
    on_hub = _DATASET.fullmatch(name) is not None and not is_place(name)
    return name if name in _CORPORA or on_hub else _last_part(name)


def dataset_of(name: str) -> str | None:
    """Return the dataset on the hub in ``hf:OWNER/NAME/CONFIG`` or ``hf:NAME``.

    None for any other name, and for ``hf:A/B``, which may be dataset B of owner A or configuration
    B of dataset A.
    """
    parts = name.removeprefix(DATASET).split("/")
    if not name.startswith(DATASET) or len(parts) not in (1, 3):
        return None
    named = hub_name("/".join(parts[:2]) if len(parts) == 3 else parts[0])
    return None if named is None or named.revision else named.repository


def _last_part(text: str) -> str:
    last = _SEPARATOR.split(text.rstrip("/\\ "))[-1].removeprefix(DATASET)
    return last if last not in ("", ".", "..", "~") else "a local file"
