"""The first layers of a model and their exit as a plain checkpoint: ``offramp export``."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.folders import new_folder
from offramp.models.base import whole_step
from offramp.models.exit_heads import ExitHead
from offramp.models.huggingface.backbone import save_backbone
from offramp.models.huggingface.calls import close
from offramp.models.huggingface.library import quiet, transformers
from offramp.models.huggingface.model import HuggingFaceModel, as_huggingface
from offramp.models.loading import load_weights
from offramp.models.model_files import find_model
from offramp.models.native.decoder import Transformer
from offramp.models.native.llama import first_layers, native_of


def export_exit(
    name: str | Path,
    exit_layer: int,
    out: Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the first ``exit_layer`` layers, with that exit's norm and LM head, into a new folder.

    Any program that reads Hugging Face checkpoints can read it. ``base`` is the place of the
    backbone of a folder of exits, if it was moved.

    Raises ConfigError for a layer that is no exit of the model or a head that no plain checkpoint
    can hold (``adapter``), UnsupportedArchitectureError where the shorter model would not say
    what the exit says, or where its blocks share keys and values.
    """
    files = find_model(name, base=base)
    files.require_numbers("since a plain checkpoint holds numbers")
    layers = (exit_layer,) if files.kind == "checkpoint" else None
    model = load_weights(files, runner="transformers", exit_layers=layers, dtype=dtype)
    texts = files.tokenizer_folder
    model.silence_untrained()  # a plain checkpoint's exits are what they are
    if exit_layer not in model.exit_layers:
        raise ConfigError(
            f"exit: expected one of the model's exit layers "
            f"{', '.join(map(str, model.exit_layers))}, got {exit_layer}"
        )
    native = native_of(model)
    if native is not None and native.config.cache_layers < native.num_layers:
        short = _without_shared(native, exit_layer)
    else:
        short = shortened(as_huggingface(model), exit_layer)
    with new_folder(out) as folder:
        save_backbone(short, folder, texts=texts)


def _without_shared(model: Transformer, exit_layer: int) -> Any:
    """The same of a native model whose upper blocks share keys and values, for a lower exit."""
    most = model.config.cache_layers
    if exit_layer > most:
        raise UnsupportedArchitectureError(
            f"exit: expected at most {most}, since the blocks above share keys and values, for "
            f"which transformers has no architecture, got {exit_layer}"
        )
    _refuse_adapter(model.exits.at(exit_layer), exit_layer)
    return first_layers(model, exit_layer).to_transformers()


def _refuse_adapter(own: ExitHead | None, exit_layer: int) -> None:
    if own is not None and own.adapter is not None:
        raise ConfigError(
            f"exit: expected an exit whose head is shared, norm or full, since no plain checkpoint "
            f"can hold an adapter, got exit {exit_layer} with one"
        )


@torch.no_grad()
def shortened(model: HuggingFaceModel, exit_layer: int) -> Any:
    """The causal language model of ``transformers`` that says what an exit says."""
    own = model.exits.at(exit_layer)
    parts = _own_parts(model, own, exit_layer)
    config = deepcopy(model.backbone.config)
    text = config.get_text_config()
    text.num_hidden_layers = exit_layer
    for name, value in vars(text).items():  # what the config says of every layer
        if isinstance(value, list) and len(value) == model.num_layers:
            setattr(text, name, value[:exit_layer])
    if own is not None and own.lm_head is not None:
        config.tie_word_embeddings = text.tie_word_embeddings = False
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            short = (
                transformers()
                .AutoModelForCausalLM.from_config(
                    config, dtype=model.dtype, trust_remote_code=False
                )
                .eval()
            )
        wanted = short.state_dict()
        state = {**model.backbone.state_dict(), **parts}
        short.load_state_dict({name: state[name] for name in wanted})
    except (KeyError, RuntimeError, ValueError):  # ValueError: layers without those they share with
        raise UnsupportedArchitectureError(
            f"{model.model_type}: its first {exit_layer} layers are no smaller model of its kind"
        ) from None
    short.to(model.device)
    ids = torch.arange(8, device=model.device)[None] % model.vocab_size
    [(_, h)] = model.states_at(ids, [exit_layer], step=whole_step(ids))
    if not close(short(input_ids=ids).logits, model.unembed(h, exit_layer)):
        raise UnsupportedArchitectureError(
            f"{model.model_type}: its first {exit_layer} layers, as a model of their own, do not "
            "say what the exit says"
        )
    short.generation_config = deepcopy(model.backbone.generation_config)
    return short


def _own_parts(
    model: HuggingFaceModel, own: ExitHead | None, exit_layer: int
) -> dict[str, torch.Tensor]:
    """The parameters of an exit's own head by the names that the final ones have."""
    if own is None:
        return {}
    _refuse_adapter(own, exit_layer)
    final = model.final_norm
    if final is None:
        raise ConfigError(
            f"exit: expected an exit that has the final norm, since {model.model_type} has none "
            f"to put its own in the place of, got exit {exit_layer}"
        )
    parts = _named(model.backbone, final, own.norm)
    if own.lm_head is not None:
        parts |= _named(model.backbone, model.backbone.get_output_embeddings(), own.lm_head)
    return parts


def _named(backbone: nn.Module, place: nn.Module, part: nn.Module) -> dict[str, torch.Tensor]:
    [prefix] = [name for name, module in backbone.named_modules() if module is place]
    return {f"{prefix}.{name}": value for name, value in part.state_dict().items()}
