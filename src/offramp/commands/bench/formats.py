"""The weight formats in which one model is timed."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from offramp.errors import ConfigError
from offramp.models.native.schemes import SCHEMES
from offramp.models.open import OpenedModel, open_model


def format_of(opened: OpenedModel) -> str:
    """Return the name of the weight format of a model: a scheme, or else a precision."""
    return opened.weights or opened.precision


def in_formats(
    opened: OpenedModel, wanted: Iterable[str], note: Callable[[str], None] = lambda text: None
) -> dict[str, OpenedModel]:
    """Return the model in each of these formats, by their names; in its own if none is named.

    What is not quantised is in float32, or in the precision of a model that is quantised already.
    Raises ConfigError for another format of a model in memory or of files with quantised weights.
    """
    own, found = format_of(opened), {}
    for name in wanted or (own,):
        note(f"{name}: weights")
        found[name] = opened if name == own else _in_format(opened, name)
    return found


def _in_format(opened: OpenedModel, name: str) -> OpenedModel:
    if opened.files is None or opened.files.weight_format is not None:
        own = format_of(opened)
        raise ConfigError(f"weights: expected {own}, the format of {opened.name}, got {name}")
    scheme = name if name in SCHEMES else None
    beside = opened.dtype if opened.weights else torch.float32
    again = open_model(
        opened.files,
        exit_layers=opened.model.exit_layers[:-1] if opened.files.kind == "checkpoint" else None,
        dtype=beside if scheme else getattr(torch, name),
        weights=scheme,
        device=opened.model.device,
    )
    again.model.silence_untrained()
    return replace(again, fitted=opened.fitted, first_tokens=opened.first_tokens)
