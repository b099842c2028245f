"""What ``offramp bench`` decodes. Imports no PyTorch."""

from collections.abc import Iterable
from dataclasses import dataclass

from offramp.errors import ConfigError
from offramp.exits.confidence_names import check_confidence
from offramp.models.native.schemes import SCHEMES

FORMATS = ("float32", "float64", "bfloat16", *SCHEMES)
"""Weight formats in which a model can be timed: precisions, and schemes of quantised weights."""
LLAMA_CPP = ("f32", "bf16", "q8_0", "q4_1")
"""Weight formats in which llama.cpp is timed."""
BITS = {
    **{"float64": 64, "float32": 32, "bfloat16": 16, "int8": 8, "int4": 4},
    **{"f32": 32, "bf16": 16, "q8_0": 8, "q4_1": 4},
}
"""Bits of a weight, by format: methods of the same bits are compared."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to decode, and how often."""

    prompts: int = 4
    "Number of prompts, taken from the text at equal distances."
    prompt_tokens: int = 64
    "Tokens in each prompt."
    max_new_tokens: int = 64
    "New tokens for each prompt; no token ends a text."
    prefill_tokens: int | None = None
    """Tokens of a longer prompt, at the same places, of which only the time to the first token is
    measured, at full depth (default: none)."""
    batch_size: int = 1
    "Number of prompts that are decoded at once."
    repeats: int = 3
    "Number of times that every method decodes every prompt."
    weights: tuple[str, ...] = ()
    """Weight formats to time, such as float32,bfloat16,int8,int4 (default: that of the model as it
    is opened)."""
    thresholds: tuple[float, ...] = ()
    "Thresholds of confident exit to time."
    compute_pct: float | None = 65.0
    "Also time the threshold at which decoding runs about this percentage of the layers."
    confidence: str | None = None
    """The confidence measure of the exits (default: gain, with max_prob beside it, where gain gates
    were fitted to all exits; else max_prob)."""
    draft_exit: int | None = None
    "The exit that drafts (default: the first)."
    ppl_tokens: int = 4096
    "Number of tokens, from the beginning of the text, on which PPL is measured; 0 for none."
    peers: bool = True
    "Also time transformers, and llama.cpp and economize if they are installed."
    gguf: str | None = None
    "The model as a GGUF file, for llama.cpp (default: the file of smollm2-135m)."
    llama_cpp: tuple[str, ...] = LLAMA_CPP
    "Weight formats in which llama.cpp is timed; it converts the GGUF file itself."

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.max_new_tokens < 2:
            raise ConfigError(f"max_new_tokens: expected at least 2, got {self.max_new_tokens}")
        if self.prefill_tokens is not None and self.prefill_tokens < 1:
            raise ConfigError(f"prefill_tokens: expected at least 1, got {self.prefill_tokens}")
        if self.ppl_tokens < 0:
            raise ConfigError(f"ppl_tokens: expected at least 0, got {self.ppl_tokens}")
        if self.prompts % self.batch_size:
            raise ConfigError(
                f"batch_size: expected a divisor of {self.prompts} prompts, got {self.batch_size}"
            )
        if self.compute_pct is not None and not 0 < self.compute_pct < 100:
            raise ConfigError(
                f"compute_pct: expected a number between 0 and 100, got {self.compute_pct:g}"
            )
        if self.confidence is not None:
            check_confidence(self.confidence)
        _check_names("weights", self.weights, FORMATS)
        _check_names("llama_cpp", self.llama_cpp, LLAMA_CPP)
        if self.gguf is not None and not self.peers:
            raise ConfigError(f"gguf: expected none without peers, got {self.gguf}")


def same_bits(weights: str, formats: Iterable[str]) -> str | None:
    """Return the format itself, or the first one with as many bits; None if there is none."""
    known = list(formats)
    if weights in known:
        return weights
    bits = BITS.get(weights)
    return next((name for name in known if bits and BITS.get(name) == bits), None)


def _check_names(field: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{field}: expected some of {', '.join(known)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ConfigError(f"{field}: expected each format once, got {', '.join(names)}")
