"""Load and save a model folder: ``config.json``, ``model.safetensors``, ``tokenizer.json``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from offramp.data.hub import one_line
from offramp.errors import CheckpointError, ConfigError
from offramp.files import read_tensors, replacing, write_json
from offramp.models.native.config import DecoderConfig
from offramp.models.native.decoder import Transformer
from offramp.models.native.quantise import precision_beside, require_whole
from offramp.models.weights import to_precision
from offramp.reading import check_format, read_json, value_of

FORMAT = 1
_TIED = "lm_head.weight"
_NEEDED = {"vocab_size", "exit_layers"}


def save_checkpoint(
    model: Transformer, folder: Path, *, about: Mapping[str, Any], weights_about: Mapping[str, str]
) -> None:
    """Write ``model.safetensors``, then ``config.json``, into an existing folder.

    ``about`` is stored in config.json next to the model's config and must not change during a
    run. ``weights_about`` (step, validation figure) is stored in the header of the weights.
    """
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state[_TIED]
    with replacing(folder / "model.safetensors") as aside:
        save_file(state, aside, metadata={"format": "pt", **weights_about})
    config = {"format": FORMAT, "model": model.config.stored(), **about}
    write_json(folder / "config.json", config)


def load_checkpoint(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, dict[str, Any]]:
    """Load a model folder; returns the model in eval mode and the content of its config.json."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a model folder, found none")
    path = folder / "config.json"
    about = read_json(path)
    check_format(about, FORMAT, path, "an offramp model")
    if not isinstance(stored := about.get("model"), dict) or not set(stored) >= _NEEDED:
        raise CheckpointError(f"{path}: expected a decoder config under 'model'")
    config = value_of(DecoderConfig, stored, path)
    state = read_tensors(folder / "model.safetensors")
    if config.tie_word_embeddings:
        state[_TIED] = state.get("model.embed_tokens.weight", torch.empty(0))
    try:  # shapes first, on a model that takes no memory
        model = empty_model(config, state, path, device="meta")
        model.load_state_dict(state, assign=True)
        if config.weight_format is None:
            model = empty_model(config, state, path)
            model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / 'model.safetensors'}: the weights do not fit config.json: "
            + one_line(error)
        ) from None
    if config.weight_format is not None:
        dtype = _checked(model, folder, dtype)
        model.exits.trained = about.get("exits_trained") is not False
    to_precision(model, dtype)
    return model.to(device).eval(), about


def _checked(model: Transformer, folder: Path, dtype: torch.dtype | None) -> torch.dtype:
    """Check the tensors of a quantised model, and return the precision of what is not quantised."""
    assert model.config.weight_format is not None
    try:
        require_whole(model)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'model.safetensors'}: {error}") from None
    return precision_beside(model.config.weight_format, dtype, model.dtype)


def empty_model(
    config: DecoderConfig, state: Mapping[str, torch.Tensor], path: Path, *, device: str = "cpu"
) -> Transformer:
    """Return a model of this shape for the parameters ``state``.

    Raises CheckpointError, which names the config's file ``path``, for a shape of more layers
    than there are parameters, and for one that does not fit into memory.
    """
    if config.num_hidden_layers > len(state):
        raise CheckpointError(
            f"{path}: num_hidden_layers: expected at most {len(state)}, the number of parameters "
            f"in {path.with_name('model.safetensors')}, got {config.num_hidden_layers}"
        )
    try:
        with torch.device(device):
            return Transformer(config)
    except (TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None


def weights_about(folder: Path) -> dict[str, str]:
    """Return the ``weights_about`` of ``save_checkpoint`` from the header of the weights."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return dict(file.metadata())
