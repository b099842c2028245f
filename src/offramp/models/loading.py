"""Load the weights of a model for one of the two runners."""

import warnings
from collections.abc import Iterable
from itertools import chain
from typing import Literal

import torch

from offramp.errors import (
    CheckpointError,
    ConfigError,
    OfframpWarning,
    UnsupportedArchitectureError,
)
from offramp.models.head_kinds import ExitHeadKind
from offramp.models.huge_pages import use_huge_pages
from offramp.models.huggingface.exits_file import from_pretrained, load_exits, tuned_dtype
from offramp.models.huggingface.library import installed
from offramp.models.huggingface.model import HuggingFaceModel, resolve_exit_layers
from offramp.models.model_files import ModelFiles
from offramp.models.native.checkpoint import load_checkpoint
from offramp.models.native.decoder import Transformer
from offramp.models.native.llama import load_native
from offramp.models.native.quantise import check_scheme, precision_beside, quantised
from offramp.models.native.schemes import Scheme
from offramp.models.reference import agrees
from offramp.models.weights import stored_dtype, to_precision

Runner = Literal["native", "transformers"]


def own_dtype(files: ModelFiles) -> torch.dtype:
    """Return the precision in which a model is opened if none is chosen."""
    if files.kind == "exits":
        return tuned_dtype(files.about)
    if files.kind != "native":
        return stored_dtype(files.backbone)
    scheme = files.weight_format
    if scheme is None:
        return torch.float32
    return precision_beside(scheme, None, stored_dtype(files.backbone))


def exact_dtype(files: ModelFiles) -> torch.dtype:
    """Return a precision that holds every weight of the files as it is."""
    stored = stored_dtype(files.backbone)
    if files.kind != "exits":
        return stored
    return torch.promote_types(stored, tuned_dtype(files.about))


def load_weights(
    files: ModelFiles,
    *,
    runner: Runner | None = None,
    exit_layers: Iterable[int] | None = None,
    exit_head: ExitHeadKind | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: str | None = None,
) -> Transformer | HuggingFaceModel:
    """Load a model in eval mode, without its tokenizer; see ``open_model``."""
    model = _loaded(
        files,
        runner=runner,
        exit_layers=exit_layers,
        exit_head=exit_head,
        device=device,
        dtype=dtype,
        weights=weights,
    )
    use_huge_pages(chain(model.parameters(), model.buffers()))
    return model


def _loaded(
    files: ModelFiles,
    *,
    runner: Runner | None,
    exit_layers: Iterable[int] | None,
    exit_head: ExitHeadKind | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
    weights: str | None,
) -> Transformer | HuggingFaceModel:
    if weights is not None:
        scheme = check_scheme(weights)
        files.require_numbers(f"since {scheme} weights are made of numbers")
        return _quantised(files, scheme, exit_layers, exit_head, device, dtype)
    if files.kind == "native":
        return load_checkpoint(files.backbone.folder, device=device, dtype=dtype)[0]
    model = _pretrained(files, runner, exit_layers, exit_head, dtype)
    return model.to(device).eval()


def _quantised(
    files: ModelFiles,
    weights: Scheme,
    exit_layers: Iterable[int] | None,
    exit_head: ExitHeadKind | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> Transformer:
    """Load a model and quantise it, in the precision of its files, before anything is rounded.

    So the weights do not depend on ``dtype``, the precision of what is not quantised.
    """
    beside = precision_beside(weights, dtype, own_dtype(files))
    try:
        model = _loaded(
            files,
            runner="native",
            exit_layers=exit_layers,
            exit_head=exit_head,
            device=device,
            dtype=exact_dtype(files),
            weights=None,
        )
    except UnsupportedArchitectureError as error:
        why = str(error).partition(";")[0]
        raise UnsupportedArchitectureError(
            f"weights: expected none for {files.name}, since only the native decoder runs "
            f"{weights} weights: {why}"
        ) from None
    assert isinstance(model, Transformer)
    try:
        new = quantised(model, weights)
    except ConfigError as error:
        raise CheckpointError(f"{files.name}: {error}") from None
    to_precision(new, beside)
    return new


def _pretrained(
    files: ModelFiles,
    runner: Runner | None,
    exit_layers: Iterable[int] | None,
    exit_head: ExitHeadKind | None,
    dtype: torch.dtype | None,
) -> Transformer | HuggingFaceModel:
    """Load a Hugging Face checkpoint, with its exits if it has any, for the chosen runner."""
    layers = None if exit_layers is None else tuple(exit_layers)
    if runner != "transformers":
        try:
            model = _in_native_decoder(files, layers, exit_head, dtype)
        except (UnsupportedArchitectureError, CheckpointError):
            if runner == "native" or not installed():
                raise
        else:
            if agrees(model, files.backbone):
                return model
            if runner == "native":
                raise UnsupportedArchitectureError(
                    f"{files.name}: the native decoder gives other logits than transformers; "
                    "offramp.from_pretrained takes any causal language model"
                )
            warnings.warn(
                f"{files.name}: transformers runs this model, since the native decoder gives other "
                "logits",
                OfframpWarning,
                stacklevel=4,
            )
    if files.kind == "exits":
        assert files.own is not None
        return from_pretrained(files.own, base=files.backbone, dtype=dtype)
    return from_pretrained(files.backbone, exit_layers=layers, exit_head=exit_head, dtype=dtype)


def _in_native_decoder(
    files: ModelFiles,
    exit_layers: tuple[int, ...] | None,
    exit_head: ExitHeadKind | None,
    dtype: torch.dtype | None,
) -> Transformer:
    if files.kind == "exits":
        assert files.own is not None
        model = load_native(
            files.backbone,
            exit_layers=files.about["exit_layers"],
            exit_head=files.about["exit_head"],
            dtype=dtype or tuned_dtype(files.about),
        )
        load_exits(model.exits, files.own, files.about)
        return model
    depth = files.config.get("num_hidden_layers", 1)
    if type(depth) is not int or depth < 1:
        raise CheckpointError(
            f"{files.name}: num_hidden_layers: expected at least 1 layer, got {depth!r}"
        )
    layers = resolve_exit_layers(exit_layers, depth)
    return load_native(
        files.backbone, exit_layers=layers, exit_head=exit_head or "shared", dtype=dtype
    )
