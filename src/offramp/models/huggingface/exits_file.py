"""Load and save the exits of pretrained models.

The backbone stays a plain Hugging Face checkpoint. The exits are two files, in the same folder or
in another folder that names the backbone and its hash: ``offramp.json`` (exit layers, kind of
head, training, policy) and ``exits.safetensors`` (``exits.<layer>.norm.weight`` and so on).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from offramp.data.hub import one_line
from offramp.errors import CheckpointError, ConfigError
from offramp.files import (
    file_sha256,
    read_tensors,
    replacing,
    write_json,
    writing,
)
from offramp.folders import new_folder
from offramp.models.computation import file_hashes
from offramp.models.exit_heads import ExitHeads
from offramp.models.head_kinds import ExitHeadKind
from offramp.models.huggingface.backbone import load_backbone, save_backbone
from offramp.models.huggingface.library import quiet
from offramp.models.huggingface.model import HuggingFaceModel
from offramp.models.huggingface.places import base_of, place_of
from offramp.models.sources import Source, find_checkpoint
from offramp.models.weights import DTYPES, to_precision
from offramp.reading import check_format, read_json, value_of
from offramp.version import __version__

FORMAT = 1
"""The newest format of ``offramp.json`` and ``exits.safetensors``; older ones are read."""
EXITS_JSON = "offramp.json"
EXITS_FILE = "exits.safetensors"
_NEXT_JSON = "offramp.new.json"


def from_pretrained(
    id_or_dir: str | Path | Source | nn.Module,
    *,
    exit_layers: Iterable[int] | None = None,
    exit_head: ExitHeadKind | None = None,
    base: str | Path | Source | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> HuggingFaceModel:
    """Give exits to a decoder-only language model of ``transformers``, or load such a model.

    ``id_or_dir`` is a checkpoint's folder, a name on the Hugging Face hub, ``smollm2-135m``
    (extra ``demo``), a folder that ``save_exits`` wrote, or a model in memory.
    ``exit_layers`` None puts exits at each quarter of the depth; ``exit_head`` None is
    ``shared``; a folder with exits defines both. ``base`` is the current place of the backbone of
    such a folder, if it was moved. ``dtype`` None keeps the checkpoint's precision. Returns the
    model in eval mode.

    Raises CheckpointError for files that are missing, damaged, changed or pickles; ConfigError
    for exits out of range; UnsupportedArchitectureError for a model that is not a decoder-only
    language model.
    """
    if isinstance(id_or_dir, nn.Module):
        model = _with_exits(id_or_dir, exit_layers, exit_head)
        to_precision(model, dtype)
        return model.to(device).eval()
    folder = None if isinstance(id_or_dir, Source) else Path(id_or_dir).expanduser()
    if folder is None or not (folder / EXITS_JSON).is_file():
        if base is not None:
            raise ConfigError(f"base: expected none without a folder of exits, got {id_or_dir}")
        source = find_checkpoint(id_or_dir)
        model = _with_exits(load_backbone(source, dtype), exit_layers, exit_head)
        model.source = source
        return model.to(device).eval()
    if exit_layers is not None or exit_head is not None:
        raise ConfigError(
            f"exit_layers and exit_head: expected none, since {folder / EXITS_JSON} defines them"
        )
    return _load_exits(folder, base, dtype).to(device).eval()


def save_exits(
    model: HuggingFaceModel,
    folder: str | Path,
    *,
    trained: Mapping[str, Any] | None = None,
    policy: Mapping[str, Any] | None = None,
    backbone: bool | None = None,
) -> None:
    """Create a folder and write ``exits.safetensors`` and ``offramp.json`` into it.

    ``trained`` describes the training of the exits (None if they were not trained), and
    ``policy`` how to use them. With ``backbone`` True the backbone and its tokenizer are written
    too, as a plain checkpoint; with None they are written unless the backbone is frozen. If they
    are not written, ``offramp.json`` names the checkpoint of the backbone and its hash.
    """
    folder = Path(folder)
    if backbone is None:
        backbone = any(parameter.requires_grad for parameter in model.backbone.parameters())
    if not backbone and model.source is None:
        raise ConfigError(
            "backbone: expected True, since the model does not come from a checkpoint"
        )
    about = {"trained": trained, "policy": policy}
    if folder.is_dir() and any(folder.iterdir()):
        _save_into(model, folder, backbone=backbone, **about)
        return
    with new_folder(folder) as aside:
        _save_into(model, aside, backbone=backbone, **about)
    if backbone:
        model.source = Source(id=str(folder), folder=folder)


def _save_into(
    model: HuggingFaceModel,
    folder: Path,
    *,
    backbone: bool,
    trained: Mapping[str, Any] | None,
    policy: Mapping[str, Any] | None,
) -> None:
    if backbone:
        source = model.source
        save_backbone(model.backbone, folder, texts=None if source is None else source.folder)
        model.source = Source(id=str(folder), folder=folder)
    assert model.source is not None
    write_exits(
        folder,
        model.exits,
        source=model.source,
        exit_layers=model.exit_layers,
        exit_head=model.exit_head,
        model_type=model.model_type,
        dtype=model.dtype,
        trained=trained,
        policy=policy,
    )


def write_exits(
    folder: Path,
    exits: ExitHeads,
    *,
    source: Source,
    exit_layers: Iterable[int],
    exit_head: str,
    model_type: str,
    dtype: torch.dtype,
    trained: Mapping[str, Any] | None,
    policy: Mapping[str, Any] | None,
    adapter: Mapping[str, str] | None = None,
) -> str:
    """Write ``exits.safetensors`` and ``offramp.json`` into an existing folder.

    ``adapter`` are the hashes of the backbone's adapter in the folder. Returns the hash of
    ``exits.safetensors``. Of exits that are in the folder already, either the old ones or the new
    ones are there at any time: until ``exits.safetensors`` is replaced, the new description is in
    a file of its own, ``offramp.new.json``.
    """
    heads = {f"exits.{name}": value for name, value in exits.state_dict().items()}
    with replacing(folder / EXITS_FILE) as aside:
        save_file({name: value.contiguous() for name, value in heads.items()}, aside)
        sha256 = file_sha256(aside)
        content = {
            "format": FORMAT,
            "offramp_version": __version__,
            "base": {
                **place_of(source, folder),
                "sha256": source.sha256,
                **file_hashes(source),
                **(adapter or {}),
            },
            "model_type": model_type,
            "dtype": str(dtype).removeprefix("torch."),
            "exit_layers": list(exit_layers),
            "exit_head": exit_head,
            "exits_sha256": sha256,
            "trained": None if trained is None else dict(trained),
            "policy": None if policy is None else dict(policy),
        }
        write_json(folder / _NEXT_JSON, content)
    with writing(folder):
        (folder / _NEXT_JSON).replace(folder / EXITS_JSON)
    return sha256


def _described_by(folder: Path) -> Path:
    """Return the file that describes a folder's exits.

    It is ``offramp.new.json`` if ``write_exits`` was stopped between its two last steps.
    """
    path, newer = folder / EXITS_JSON, folder / _NEXT_JSON
    if newer.is_file() and (folder / EXITS_FILE).is_file():
        described = read_json(newer)
        sha256 = described.get("exits_sha256") if isinstance(described, dict) else None
        return newer if sha256 == file_sha256(folder / EXITS_FILE) else path
    return path


@dataclass(frozen=True, kw_only=True)
class _Base:
    id: str
    sha256: str
    revision: str | None = None
    config_sha256: str | None = None
    tokenizer_sha256: str | None = None
    adapter_sha256: str | None = None
    adapter_config_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The fields of ``offramp.json`` that are read."""

    base: _Base
    exit_layers: tuple[int, ...]
    exit_head: ExitHeadKind
    dtype: str
    trained: Mapping[str, Any] | None = None
    policy: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")


def read_exits(folder: str | Path) -> dict[str, Any]:
    """Return the content of a folder's ``offramp.json``."""
    path = _described_by(Path(folder))
    about: dict[str, Any] = check_format(read_json(path), FORMAT, path, "exits")
    value_of(_Stored, about, path, foreign=True)
    return about


def tuned_dtype(about: Mapping[str, Any]) -> torch.dtype:
    """Return the precision in which exits were trained, from the content of ``read_exits``."""
    return DTYPES[about["dtype"]]


def _load_exits(
    folder: Path, base: str | Path | Source | None, dtype: torch.dtype | None
) -> HuggingFaceModel:
    about = read_exits(folder)
    source = base_of(folder, about, base)
    backbone = load_backbone(source, dtype or tuned_dtype(about))
    model = _with_exits(backbone, about["exit_layers"], about["exit_head"])
    model.source = source
    load_exits(model.exits, folder, about)
    return model


def load_exits(exits: ExitHeads, folder: Path, about: Mapping[str, Any]) -> None:
    """Load the parameters of a model's exits from a folder's ``exits.safetensors``.

    ``about`` is the content of ``read_exits``.
    """
    path = folder / EXITS_FILE
    stored = read_tensors(path)
    if (found := file_sha256(path)) != about.get("exits_sha256"):
        raise CheckpointError(
            f"{path}: expected the exits of {EXITS_JSON}, sha256 {about.get('exits_sha256')}, "
            f"got {found}"
        )
    own = {  # gates have names of their own
        name.removeprefix("exits."): value
        for name, value in stored.items()
        if name.startswith("exits.")
    }
    try:
        exits.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit {EXITS_JSON}: {one_line(error)}") from None
    exits.trained = about.get("trained") is not None


def _with_exits(
    backbone: nn.Module, exit_layers: Iterable[int] | None, exit_head: ExitHeadKind | None
) -> HuggingFaceModel:
    with quiet():
        return HuggingFaceModel(backbone, exit_layers=exit_layers, exit_head=exit_head or "shared")
