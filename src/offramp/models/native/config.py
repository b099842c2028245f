"""The shape of a native decoder. Imports no PyTorch, for a fast start of the command line."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from offramp.errors import ConfigError
from offramp.models.head_kinds import EXIT_HEAD_KINDS, ExitHeadKind

NormOrder = Literal["pre", "post"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a native decoder; the field names are Hugging Face's.

    A policy may stop at each of ``exit_layers``; the last layer is added if it is missing.
    ``intermediate_size`` None means 8/3 of the width, rounded to a multiple of 16.
    ``num_key_value_heads`` None means one per attention head.
    """

    vocab_size: int = 256
    "Size of the vocabulary; training sets it from the tokenizer."
    hidden_size: int = 128
    "Width of the model."
    num_hidden_layers: int = 6
    "Number of blocks."
    num_attention_heads: int = 4
    "Number of attention heads; must divide the width."
    num_key_value_heads: int | None = None
    "Number of key and value heads; must divide the number of attention heads."
    head_dim: int | None = None
    "Width of one attention head; by default the width divided by the attention heads."
    intermediate_size: int | None = None
    "Number of hidden units of the SwiGLU."
    exit_layers: tuple[int, ...] = (1,)
    "Layers where a token may leave, counted from 1."
    exit_head: ExitHeadKind = "shared"
    """The exit's own layers: shared (none), norm, adapter, full (norm and LM head) or specialist
    (norm, small adapter and LM head)."""
    norm: NormOrder = "pre"
    "RMSNorm before each sublayer (pre) or after each residual sum (post)."
    tie_word_embeddings: bool = False
    "Use the embedding as the LM head."
    max_position_embeddings: int = 4096
    "Length of the longest sequence, in tokens."
    rms_norm_eps: float = 1e-6
    "Epsilon of the RMSNorm."
    rope_theta: float = 10_000.0
    "Base of the rotary positions."

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a number above 0, got {value}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or 0
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise ConfigError(f"head_dim: expected an even number above 0, got {self.head_dim}")
        if self.head_dim is None and self.hidden_size % (2 * heads):
            raise ConfigError(
                f"hidden_size: expected a multiple of 2 x {heads} attention heads, "
                f"got {self.hidden_size}"
            )
        if self.num_key_value_heads is not None and (kv_heads < 1 or heads % kv_heads):
            raise ConfigError(
                f"num_key_value_heads: expected a divisor of {heads} attention heads, "
                f"got {kv_heads}"
            )
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ConfigError(
                f"intermediate_size: expected at least 1, got {self.intermediate_size}"
            )
        if self.exit_head not in EXIT_HEAD_KINDS:
            raise ConfigError(
                f"exit_head: expected one of {', '.join(EXIT_HEAD_KINDS)}, got {self.exit_head!r}"
            )
        if self.norm not in get_args(NormOrder):
            raise ConfigError(f"norm: expected pre or post, got {self.norm!r}")
        last = self.num_hidden_layers
        for layer in self.exit_layers:
            if not 1 <= layer <= last:
                raise ConfigError(f"exit_layers: expected layers from 1 to {last}, got {layer}")
        object.__setattr__(self, "exit_layers", tuple(sorted({*self.exit_layers, last})))
        if self.intermediate_size is None:
            units = max(16, round(self.hidden_size * 8 / 3 / 16) * 16)
            object.__setattr__(self, "intermediate_size", units)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
