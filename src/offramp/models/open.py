"""Open a model once: ``find_model`` finds its files, and ``open_model`` loads them.

Each command, and ``offramp.load``, uses one ``OpenedModel`` and does not search for files again.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from offramp.errors import (
    ConfigError,
    OfframpWarning,
    UnsupportedArchitectureError,
)
from offramp.exits.gate import NOTHING_FITTED, FittedExits
from offramp.models.base import TrainableModel
from offramp.models.bos import bos_tokens
from offramp.models.fitted import check_fitted, load_fitted
from offramp.models.head_kinds import ExitHeadKind
from offramp.models.huggingface.exits_file import from_pretrained
from offramp.models.huggingface.model import HuggingFaceModel
from offramp.models.identity import model_sha256
from offramp.models.loading import Runner, load_weights
from offramp.models.model_files import (
    UNKNOWN_TRAINING,
    ModelFiles,
    TrainingRecord,
    check_vocabulary,
    find_model,
    load_tokenizer,
    token_ids,
)
from offramp.models.native.decoder import Transformer
from offramp.models.native.quantise import weight_format
from offramp.models.native.schemes import Scheme

DEFAULT_WINDOW = 256
"""Number of tokens per window if the training window of the model is unknown."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OpenedModel:
    """A model with its tokenizer, fitted gates and other data.

    ``open_model`` and ``open_in_memory`` make it.
    """

    name: str
    "The folder or name of the model, for messages."
    model: TrainableModel
    "The model with its exits, in eval mode."
    tokenizer: Tokenizer
    "The model's tokenizer, of the tokenizers library."
    fitted: FittedExits = NOTHING_FITTED
    "Gates, temperatures and draft vocabulary that were fitted to its exits."
    runner: Runner
    "The code that runs the model: the native decoder, or transformers."
    record: TrainingRecord = UNKNOWN_TRAINING
    "What the model and its exits were trained on."
    end_tokens: tuple[int, ...] = ()
    "Ids of the tokens that end every text of this model."
    first_tokens: tuple[int, ...] = ()
    """Ids that begin every window and prompt, such as BOS: context, never predicted. See
    ``with_bos``."""
    files: ModelFiles | None = None
    "The model's files; None for a model in memory."
    chat_tokenizer: Any = None
    "The tokenizer of transformers with a chat template, if the model came with one in memory."

    def __repr__(self) -> str:
        model = self.model
        exits = ", ".join(map(str, model.exit_layers[:-1])) or "none"
        weights = "" if self.weights is None else f", {self.weights} weights"
        return (
            f"OpenedModel({self.name!r}: {model.num_layers} layers, exits {exits}, "
            f"vocabulary {model.vocab_size:,}{weights}, run by {self.runner})"
        )

    @property
    def exits_trained(self) -> bool:
        """Whether the model's exits were trained."""
        return self.model.exits_trained

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the model's parameters."""
        return self.model.dtype

    @property
    def precision(self) -> str:
        """Name of the precision, such as float32."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def weights(self) -> Scheme | None:
        """Scheme of the quantised weights, int8 or int4; None if they are numbers."""
        return weight_format(self.model)

    @property
    def unfinished(self) -> bool:
        """Whether the training run of this model has not ended; it is the best model so far."""
        return self.files is not None and self.files.unfinished

    @property
    def window(self) -> int:
        """Number of tokens per window of text: that of the training, or 256 if unknown.

        The first tokens are not counted, but have room in the model's longest sequence.
        """
        longest = max(1, self.model.max_length - len(self.first_tokens))
        return min(self.record.window or DEFAULT_WINDOW, longest)

    def with_bos(self, bos: str) -> "OpenedModel":
        """Return the model whose texts begin as ``bos`` says: auto, yes or no.

        ``auto`` is what the model was trained with. Raises ConfigError for ``yes`` if neither the
        tokenizer nor the config names such a token.
        """
        backbone = getattr(self.model, "backbone", None) if self.files is None else None
        chosen = bos_tokens(
            bos,
            self.tokenizer,
            self.files,
            vocab_size=self.model.vocab_size,
            plain=self.files.plain
            if self.files is not None
            else isinstance(self.model, Transformer),
            config=self.files.config if self.files else vars(getattr(backbone, "config", self)),
        )
        return self if chosen == self.first_tokens else replace(self, first_tokens=chosen)

    @property
    def sha256(self) -> str:
        """The hash of weights, config, tokenizer, exits and gates, which certificates name.

        That of a model in memory is computed each time, since its parameters may change.
        """
        return self._hash() if self.files is None else self._stored_sha256

    @cached_property
    def _stored_sha256(self) -> str:
        return self._hash()

    def _hash(self) -> str:
        return model_sha256(self.model, self.tokenizer.to_str(), self.fitted, self.files)

    def warn_of_bos(self) -> None:
        """Warn with an OfframpWarning if gates were fitted to texts that begin differently."""
        if self.fitted.bos not in (None, bool(self.first_tokens)):
            fitted, other = ("yes", "no") if self.fitted.bos else ("no", "yes")
            warnings.warn(
                f"{self.name}: its gates and temperatures were fitted with --bos {fitted}, but "
                f"texts begin with --bos {other}",
                OfframpWarning,
                stacklevel=3,
            )

    def require_exits(self) -> None:
        """Raise a ConfigError if the model has no exit before its last layer."""
        if len(self.model.exit_layers) < 2:
            raise ConfigError(
                f"exit layers: expected at least one before the last layer, got none in {self.name}"
            )


def open_model(
    name: str | Path | ModelFiles,
    *,
    runner: Runner | None = None,
    exit_layers: Iterable[int] | None = None,
    exit_head: ExitHeadKind | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: str | None = None,
) -> OpenedModel:
    """Open a model, in eval mode, with its tokenizer and its fitted gates and temperatures.

    ``name`` is a folder that ``offramp train``, ``offramp tune`` or ``save_exits`` wrote, the
    folder of a Hugging Face checkpoint, a name on the hub, or ``smollm2-135m``. With ``runner``
    None, Llama-family checkpoints run in the native decoder, which decodes faster, and others in
    transformers. The native decoder is compared with transformers when it first opens a
    checkpoint; if it gives other logits, transformers runs the model, with an OfframpWarning, or,
    with ``runner`` native, an UnsupportedArchitectureError is raised.
    ``exit_layers`` and ``exit_head`` are only for plain checkpoints; None puts exits at each
    quarter of the depth. ``dtype`` None keeps the precision of the files, or that in which the
    exits were trained. ``weights`` int8 or int4 quantises the weights of attention, MLP and LM
    heads; ``dtype``, float32 or bfloat16, is then the precision of everything else. Only the
    native decoder runs such a model.

    Raises CheckpointError for files that are missing, damaged, changed or pickles, and for a
    tokenizer with more tokens than the model; UnsupportedArchitectureError for a model that is
    not a decoder-only language model; ConfigError for exits out of range.
    """
    files = name if isinstance(name, ModelFiles) else find_model(name)
    model = load_weights(
        files,
        runner=runner,
        exit_layers=exit_layers,
        exit_head=exit_head,
        device=device,
        dtype=dtype,
        weights=weights,
    )
    tokenizer = load_tokenizer(files)
    check_vocabulary(files.name, tokenizer, model)
    fitted = NOTHING_FITTED
    if files.own is not None:
        fitted = load_fitted(files.own, exits=lambda: files.exits_sha256, device=device)
        check_fitted(fitted, model, files.own)
    return OpenedModel(
        name=files.name,
        model=model,
        tokenizer=tokenizer,
        fitted=fitted,
        runner="native" if isinstance(model, Transformer) else "transformers",
        record=files.record,
        end_tokens=_of_vocabulary(files.end_tokens, model),
        files=files,
    ).with_bos("auto")


def open_in_memory(
    model: Any,
    tokenizer: Any,
    *,
    exit_layers: Iterable[int] | None = None,
    exit_head: ExitHeadKind | None = None,
) -> OpenedModel:
    """Open a causal language model of ``transformers``, or a model of offramp, in memory.

    ``tokenizer`` is a tokenizer of the tokenizers library, or a fast tokenizer of
    ``transformers``. The model's parameters are shared, not copied.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(
            "tokenizer: expected a fast tokenizer of transformers, or one of the tokenizers "
            f"library, with a model in memory, got {type(tokenizer).__name__}"
        )
    if isinstance(model, nn.Module) and any(each.is_meta for each in model.parameters()):
        raise ConfigError("model: expected parameters with values, got some on the meta device")
    own = isinstance(model, Transformer | HuggingFaceModel)
    if not own and not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: expected a name, a folder or a language model, got {type(model).__name__}"
        )
    if own and (exit_layers is not None or exit_head is not None):
        raise ConfigError("exits: expected none with a model of offramp, which has its own")
    if not own and not hasattr(model, "generation_config"):
        raise UnsupportedArchitectureError(
            f"model: expected a causal language model of transformers, got {type(model).__name__}"
        )
    opened: Transformer | HuggingFaceModel = (
        model.eval()
        if own
        else from_pretrained(
            model, exit_layers=exit_layers, exit_head=exit_head, device=model.device
        )
    )
    check_vocabulary(f"{type(model).__name__} in memory", backend, opened)
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return OpenedModel(
        name=f"{type(model).__name__} in memory",
        model=opened,
        tokenizer=backend,
        runner="native" if isinstance(opened, Transformer) else "transformers",
        end_tokens=()
        if end is None
        else _of_vocabulary(token_ids(end, f"{type(model).__name__} in memory"), opened),
        chat_tokenizer=tokenizer if backend is not tokenizer else None,
    ).with_bos("auto")


def _of_vocabulary(ids: tuple[int, ...], model: TrainableModel) -> tuple[int, ...]:
    """The ids that the model can predict: a config may name an end token that it cannot."""
    return tuple(token for token in ids if 0 <= token < model.vocab_size)
