"""One way to load any model that offramp knows, with its tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from offramp.data.hub import one_line
from offramp.data.tokenizer import TOKENIZER_FILE, make_tokenizer
from offramp.errors import CheckpointError, CorpusError, UnsupportedArchitectureError
from offramp.files import read_json
from offramp.models.huggingface.exits_file import (
    EXITS_JSON,
    base_of,
    from_pretrained,
    load_exits,
    read_exits,
)
from offramp.models.huggingface.library import quiet, transformers
from offramp.models.huggingface.model import HuggingFaceModel, resolve_exit_layers
from offramp.models.native.checkpoint import load_checkpoint
from offramp.models.native.decoder import Transformer
from offramp.models.native.llama import load_native
from offramp.models.sources import find_checkpoint


def load_model(
    path_or_name: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Transformer | HuggingFaceModel, Tokenizer]:
    """Load a model, in eval mode, and its tokenizer.

    ``path_or_name`` is a folder that ``offramp train`` or ``save_exits`` wrote, the folder of a
    Hugging Face checkpoint, a name on the hub, or ``smollm2-135m``.

    Raises CheckpointError for a tokenizer with more tokens than the model, and otherwise what
    ``load_checkpoint`` and ``from_pretrained`` raise.
    """
    model: Transformer | HuggingFaceModel
    if is_native(path_or_name):
        model, _ = load_checkpoint(path_or_name, device=device, dtype=dtype)
    else:
        model = from_pretrained(path_or_name, device=device, dtype=dtype)
    tokenizer = load_tokenizer(path_or_name)
    check_vocabulary(path_or_name, tokenizer, model)
    return model, tokenizer


def check_vocabulary(
    name: str | Path, tokenizer: Tokenizer, model: Transformer | HuggingFaceModel
) -> None:
    """Raise a CheckpointError for a tokenizer with more tokens than the model."""
    if tokenizer.get_vocab_size() > model.vocab_size:
        raise CheckpointError(
            f"{name}: expected a tokenizer of at most {model.vocab_size} tokens, as the "
            f"model has, got {tokenizer.get_vocab_size()}"
        )


def is_native(path_or_name: str | Path) -> bool:
    """Whether this is a folder that ``offramp train`` wrote."""
    path = Path(path_or_name) / "config.json"
    if not path.is_file() or (Path(path_or_name) / EXITS_JSON).is_file():
        return False
    about = read_json(path)
    return not isinstance(about, dict) or "model_type" not in about


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer of what ``load_model`` takes."""
    folder = Path(path_or_name)
    if not (folder / TOKENIZER_FILE).is_file():
        if (folder / EXITS_JSON).is_file():
            folder = base_of(folder).folder
        elif not folder.is_dir():
            folder = find_checkpoint(path_or_name).folder
    path = folder / TOKENIZER_FILE
    try:
        if path.is_file():
            return make_tokenizer(str(path), "")
        if is_native(folder) or not (folder / "config.json").is_file():
            raise FileNotFoundError
        with quiet():  # an older form: vocab.json and merges.txt, or tokenizer.model
            found = transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend: Tokenizer = found.backend_tokenizer
    except CorpusError as error:
        raise CheckpointError(str(error)) from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected the model's tokenizer, found none") from None
    except Exception as error:  # the library has many kinds
        raise CheckpointError(
            f"{path}: expected the model's tokenizer, found none that can be read: "
            f"{one_line(error)}"
        ) from None
    return backend


def load_decoder(
    path_or_name: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Transformer | HuggingFaceModel, Tokenizer]:
    """What ``load_model`` loads, for decoding: Llama-family checkpoints in the native decoder.

    It decodes faster there, to the same logits. What the native decoder cannot have is run by
    ``transformers``.
    """
    folder = Path(path_or_name)
    try:
        if is_native(path_or_name):
            raise UnsupportedArchitectureError("nothing to convert")
        if (folder / EXITS_JSON).is_file():
            about = read_exits(folder)
            model = load_native(
                base_of(folder).folder,
                exit_layers=about["exit_layers"],
                exit_head=about["exit_head"],
                dtype=dtype,
            )
            load_exits(model.exits, folder)
        else:
            depth = read_json(find_checkpoint(path_or_name).folder / "config.json")
            layers = resolve_exit_layers(None, int(depth.get("num_hidden_layers", 1)))
            model = load_native(path_or_name, exit_layers=layers, dtype=dtype)
    except UnsupportedArchitectureError:
        return load_model(path_or_name, device=device, dtype=dtype)
    return model.to(device=device, dtype=dtype).eval(), load_tokenizer(path_or_name)
