"""The shape of a native decoder. Imports no PyTorch, for a fast start of the command line."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from offramp.errors import ConfigError
from offramp.models.head_kinds import EXIT_HEAD_KINDS, ExitHeadKind
from offramp.models.native.schemes import SCHEMES, Scheme

NormOrder = Literal["pre", "post"]
RopeType = Literal["default", "linear", "llama3"]
MOST_LAYERS = 4096
"""Largest number of blocks. The deepest published decoders have about 1,000."""
MOST_ANGLES = 1 << 28
"""Largest size of a table of rotary positions: 2,097,152 positions of heads of width 128."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a native decoder; the field names are Hugging Face's.

    A policy may stop at each of ``exit_layers``; the last layer is added if it is missing.
    ``intermediate_size`` None means 8/3 of the width, rounded to a multiple of 16.
    ``num_key_value_heads`` None means one per attention head. ``kv_source_layer`` is the design of
    YOCO (Sun et al. 2024, arXiv 2405.05254), with exits.
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
    kv_source_layer: int | None = None
    """All blocks above this layer share one projection of keys and values, which reads the state
    after it (default: each block has its own). Exits from this layer on are then complete: a token
    that leaves there has left all keys and values that later tokens read."""
    upper_intermediate_size: int | None = None
    """Number of hidden units of the SwiGLU in the blocks that project no keys and values, above the
    first one above the source (default: as in all blocks)."""
    max_position_embeddings: int = 4096
    "Length of the longest sequence, in tokens."
    rms_norm_eps: float = 1e-6
    "Epsilon of the RMSNorm."
    rope_theta: float = 10_000.0
    "Base of the rotary positions."
    rope_type: RopeType = "default"
    """Scaling of the rotary positions for texts longer than those of an earlier training: default
    (none), linear, or llama3 (as in Llama 3.1)."""
    rope_factor: float = 1.0
    "Factor of the scaling, which divides the frequencies."
    rope_low_freq_factor: float = 1.0
    "With llama3: a frequency with fewer turns in the original length is divided by the factor."
    rope_high_freq_factor: float = 4.0
    "With llama3: a frequency with more turns in the original length stays as it is."
    rope_original_length: int | None = None
    "With llama3: number of positions of the earlier training."
    weight_format: Scheme | None = None
    """Scheme of the weights of attention, MLP and LM heads, int8 or int4 (see ``quantised.py``);
    None: floating-point numbers, as all other parameters have."""

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
        if self.num_hidden_layers > MOST_LAYERS:
            raise ConfigError(
                f"num_hidden_layers: expected at most {MOST_LAYERS}, got {self.num_hidden_layers}"
            )
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a number above 0, got {value}")
        self._check_source()
        self._check_rope()
        self._check_format()
        self._check_shape()
        last = self.num_hidden_layers
        for layer in self.exit_layers:
            if not 1 <= layer <= last:
                raise ConfigError(f"exit_layers: expected layers from 1 to {last}, got {layer}")
        object.__setattr__(self, "exit_layers", tuple(sorted({*self.exit_layers, last})))
        if self.intermediate_size is None:
            units = max(16, round(self.hidden_size * 8 / 3 / 16) * 16)
            object.__setattr__(self, "intermediate_size", units)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if (self.head_dim or 0) * self.max_position_embeddings > MOST_ANGLES:
            raise ConfigError(
                f"max_position_embeddings: expected at most {MOST_ANGLES // (self.head_dim or 1)} "
                f"with heads of width {self.head_dim}, got {self.max_position_embeddings}"
            )

    def _check_shape(self) -> None:
        """Raise a ConfigError for heads and units that do not fit, and for unknown names."""
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

    def _check_source(self) -> None:
        """Raise a ConfigError for a source of keys and values that has no block above it."""
        source, last = self.kv_source_layer, self.num_hidden_layers - 1
        upper = self.upper_intermediate_size
        if upper is not None and (source is None or upper < 1):
            expected = "none without kv_source_layer" if source is None else "at least 1"
            raise ConfigError(f"upper_intermediate_size: expected {expected}, got {upper}")
        if source is None:
            return
        if last < 1:
            raise ConfigError(
                f"kv_source_layer: expected none in a model of one layer, got {source}"
            )
        if not 1 <= source <= last:
            raise ConfigError(
                f"kv_source_layer: expected from 1 to {last}, below the last layer, got {source}"
            )
        if upper is not None and source == last:
            raise ConfigError(
                f"upper_intermediate_size: expected none with kv_source_layer {source} of "
                f"{self.num_hidden_layers} layers, where every block projects keys and values, got "
                f"{upper}"
            )

    def _check_format(self) -> None:
        """Raise a ConfigError for an unknown scheme, and for a tied LM head that is quantised."""
        if self.weight_format is None:
            return
        if self.weight_format not in SCHEMES:
            raise ConfigError(
                f"weight_format: expected {' or '.join(SCHEMES)}, got {self.weight_format!r}"
            )
        if self.tie_word_embeddings:
            raise ConfigError(
                f"tie_word_embeddings: expected false with {self.weight_format} weights, since the "
                "embedding stays as it is, got true"
            )

    @property
    def complete_from(self) -> int:
        """The lowest layer at which a token that leaves has left all keys and values."""
        return self.num_hidden_layers if self.kv_source_layer is None else self.kv_source_layer

    @property
    def cache_layers(self) -> int:
        """Number of layers of the cache: those of the blocks that project keys and values."""
        source = self.kv_source_layer
        return self.num_hidden_layers if source is None else source + 1

    def units(self, layer: int) -> int:
        """Return the number of hidden units of a block's SwiGLU; ``layer`` is from 0."""
        upper = self.upper_intermediate_size
        found = self.intermediate_size if upper is None or layer < self.cache_layers else upper
        assert found is not None
        return found

    def _check_rope(self) -> None:
        """Raise a ConfigError for a scaling of the rotary positions that makes no sense."""
        if self.rope_type not in get_args(RopeType):
            expected = ", ".join(get_args(RopeType))
            raise ConfigError(f"rope_type: expected one of {expected}, got {self.rope_type!r}")
        for name in _ONLY_SCALED:
            usual, got = getattr(DecoderConfig, name), getattr(self, name)
            if got != usual and name not in _READ[self.rope_type]:
                raise ConfigError(
                    f"{name}: expected none with rope_type {self.rope_type}, got {got}"
                )
        if not (math.isfinite(self.rope_factor) and self.rope_factor > 0):
            raise ConfigError(f"rope_factor: expected a number above 0, got {self.rope_factor}")
        if self.rope_type != "llama3":
            return
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        for name in ("rope_low_freq_factor", "rope_high_freq_factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a number above 0, got {value}")
        if low >= high:
            raise ConfigError(
                f"rope_low_freq_factor: expected below rope_high_freq_factor {high:g}, got {low:g}"
            )
        if self.rope_original_length is None or self.rope_original_length < 1:
            raise ConfigError(
                "rope_original_length: expected at least 1 with rope_type llama3, got "
                f"{self.rope_original_length}"
            )

    def stored(self) -> dict[str, Any]:
        """Return the fields as files store them: what a model does not have is left out."""
        left_out = () if self.rope_type != "default" else ("rope_type", *_ONLY_SCALED)
        rare = ("kv_source_layer", "upper_intermediate_size", "weight_format")
        left_out = (*left_out, *(name for name in rare if getattr(self, name) is None))
        return {name: value for name, value in asdict(self).items() if name not in left_out}


_READ: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("rope_factor",),
    "llama3": (
        "rope_factor",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
        "rope_original_length",
    ),
}
"The fields that a scaling reads, by its type."
_ONLY_SCALED = _READ["llama3"]
