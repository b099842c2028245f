"""Exits for a model of ``transformers`` in memory, from whatever a user gives as ``exits``."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from offramp.errors import ConfigError
from offramp.models.head_kinds import EXIT_HEAD_KINDS, ExitHeadKind
from offramp.models.huggingface.exits_file import (
    EXITS_JSON,
    from_pretrained,
    load_exits,
    read_exits,
)
from offramp.models.huggingface.model import HuggingFaceModel


def exits_of(value: Any) -> HuggingFaceModel | None:
    """Return the model with exits that ``value`` is, or that a model of ``offramp.load`` holds.

    None for anything else. Raises ConfigError for a model that the native decoder runs.
    """
    exits = hasattr(type(value), "exits_trained")
    held = value.model if exits and not isinstance(value, nn.Module) else value
    if isinstance(held, HuggingFaceModel):
        return held
    if exits:
        raise ConfigError(
            "exits: expected a model that transformers runs, got one that the native decoder "
            "runs; offramp.from_pretrained opens its checkpoint or its folder of exits"
        )
    return None


def with_given_exits(
    backbone: Any,
    exits: Any = None,
    exit_head: str | None = None,
    *,
    seed: int = 0,
) -> HuggingFaceModel:
    """Return a causal language model of ``transformers``, which is not copied, with exits.

    ``exits`` are layers (None: each quarter of the depth), a folder with the exits of such a
    model, or a model with exits of the same backbone, which then shares their parameters.
    ``exit_head`` is that of new exits, whose parameters depend on ``seed``.
    """
    given = exits_of(exits)
    folder = Path(exits) if isinstance(exits, str | Path) else None
    if (given or folder) and exit_head is not None:
        raise ConfigError(f"exit_head: expected none with exits that have heads, got {exit_head!r}")
    if folder is not None:
        return _of_folder(backbone, folder)
    if given is not None:
        if given.backbone is not backbone:
            raise ConfigError(
                "exits: expected the exits of the model that is trained, got those of another "
                "model; a folder or a list of layers gives them to this one"
            )
        same = from_pretrained(
            backbone, exit_layers=given.exit_layers, exit_head=given.exit_head, device=given.device
        )
        same.exits, same.source = given.exits, given.source
        return same
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return from_pretrained(
            backbone,
            exit_layers=_layers(exits),
            exit_head=_head(exit_head or "adapter"),
            device=backbone.device,
        )


def _head(name: str) -> ExitHeadKind:
    if name not in EXIT_HEAD_KINDS:
        raise ConfigError(f"exit_head: expected one of {', '.join(EXIT_HEAD_KINDS)}, got {name!r}")
    return cast("ExitHeadKind", name)


def _layers(exits: Any) -> Iterable[int] | None:
    layers = (exits,) if isinstance(exits, int) else exits
    if layers is None:
        return None
    if not isinstance(layers, Iterable) or not all(type(layer) is int for layer in layers):
        raise ConfigError(
            f"exits: expected layers, a folder of exits, or a model with exits, got {exits!r}"[:300]
        )
    return layers


def _of_folder(backbone: Any, folder: Path) -> HuggingFaceModel:
    if not (folder / EXITS_JSON).is_file():
        raise ConfigError(f"exits: expected a folder with {EXITS_JSON}, got {folder}")
    about = read_exits(folder)
    kind = backbone.config.get_text_config().model_type
    if about.get("model_type") not in (kind, backbone.config.model_type):
        raise ConfigError(
            f"exits: expected the exits of a model of type {kind}, got those of "
            f"{about.get('model_type')!r} in {folder}"
        )
    model = from_pretrained(
        backbone,
        exit_layers=about["exit_layers"],
        exit_head=about["exit_head"],
        device=backbone.device,
    )
    load_exits(model.exits, folder, about)
    return model
