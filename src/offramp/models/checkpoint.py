"""A model folder: ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

Every file is written aside, synced and renamed, so that it appears only when it is whole.
Weights are safetensors; nothing loads a pickle.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offramp.errors import CheckpointError, ConfigError
from offramp.models.transformer import DecoderConfig, Transformer

FORMAT = 1
_TIED = "lm_head.weight"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on success it is synced and takes its name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all. JSON has no infinity: it is written as "inf" or "-inf"."""
    text = json.dumps(_without_infinity(content), indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def _without_infinity(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _without_infinity(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_infinity(value) for value in content]
    return str(content) if isinstance(content, float) and math.isinf(content) else content


def read_json(path: Path) -> Any:
    """Parse a JSON file; a CheckpointError names what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a file, found none") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected readable JSON, got {error}") from None


def claim_folder(out: Path) -> None:
    """Make a new folder for a run, or take an empty one; a CheckpointError says what is wrong."""
    try:
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out}: expected a folder to write to, got a file")
        if out.exists() and any(out.iterdir()):
            raise CheckpointError(
                f"{out}: expected a new or empty folder, but it holds another run or other files; "
                "choose another --out, or remove it first"
            )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise CheckpointError(f"{out}: expected a folder that can be written to")


def claim_marked(marker: Path, content: Any) -> None:
    """Claim the folder of ``marker`` and write it there.

    What a process that was killed at that left of the file is no obstacle.
    """
    for left in marker.parent.glob(f".{marker.name}.*.tmp"):
        left.unlink(missing_ok=True)
    claim_folder(marker.parent)
    write_json(marker, content)


def save_checkpoint(
    model: Transformer, folder: Path, *, about: Mapping[str, Any], weights_about: Mapping[str, str]
) -> None:
    """Write ``model.safetensors``, then ``config.json``, into an existing folder.

    ``about`` is stored in config.json beside the model's own config and must not change during
    a run; ``weights_about`` (step, validation figure) travels inside the weights' header.
    """
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state[_TIED]
    with replacing(folder / "model.safetensors") as aside:
        save_file(state, aside, metadata={"format": "pt", **weights_about})
    config = {"format": FORMAT, "model": asdict(model.config), **about}
    write_json(folder / "config.json", config)


def load_checkpoint(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, dict[str, Any]]:
    """Load a model folder: the model in eval mode, and the content of its config.json."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a model folder, found none")
    about = read_json(folder / "config.json")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / 'config.json'}: expected an offramp model of format {FORMAT}, "
            f"got format {about.get('format') if isinstance(about, dict) else None!r}"
        )
    config = _config_of(about.get("model"), folder)
    try:
        model = Transformer(config)
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    state = read_tensors(folder / "model.safetensors")
    if config.tie_word_embeddings:
        state[_TIED] = state.get("model.embed_tokens.weight", torch.empty(0))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / 'model.safetensors'}: the weights do not fit config.json: "
            + " ".join(str(error).split())
        ) from None
    return model.to(device=device, dtype=dtype).eval(), about


def weights_about(folder: Path) -> dict[str, str]:
    """What ``save_checkpoint`` stored in the weights' header."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return dict(file.metadata())


def _config_of(stored: Any, folder: Path) -> DecoderConfig:
    known = {field.name for field in fields(DecoderConfig)}
    if not isinstance(stored, dict) or not {"vocab_size"} <= set(stored) <= known:
        raise CheckpointError(f"{folder / 'config.json'}: expected a decoder config under 'model'")
    try:
        return DecoderConfig(**{**stored, "exit_layers": tuple(stored["exit_layers"])})
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file; a CheckpointError names what is wrong with it."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_tensors(path: Path) -> None:
    """Raise a CheckpointError unless this is a whole safetensors file; its header says so."""
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected a file, found none") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected whole safetensors, got: {error}") from None
