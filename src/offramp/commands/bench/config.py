"""What ``offramp bench`` decodes. Imports no PyTorch."""

from dataclasses import dataclass

from offramp.errors import ConfigError
from offramp.exits.confidence_names import check_confidence


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to decode, and how often."""

    prompts: int = 4
    "Number of prompts, taken from the text at equal distances."
    prompt_tokens: int = 64
    "Tokens in each prompt."
    max_new_tokens: int = 64
    "New tokens for each prompt; no token ends a text."
    batch_size: int = 1
    "Number of prompts that are decoded at once."
    repeats: int = 3
    "Number of times that every method decodes every prompt."
    thresholds: tuple[float, ...] = ()
    "Thresholds of confident exit to time."
    compute_pct: float | None = 65.0
    "Also time the threshold at which decoding runs about this percentage of the layers."
    confidence: str = "max_prob"
    "The confidence measure of the exits."
    draft_exit: int | None = None
    "The exit that drafts (default: the first)."
    peers: bool = True
    "Also time transformers, and economize if it is installed."

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.max_new_tokens < 2:
            raise ConfigError(f"max_new_tokens: expected at least 2, got {self.max_new_tokens}")
        if self.prompts % self.batch_size:
            raise ConfigError(
                f"batch_size: expected a divisor of {self.prompts} prompts, got {self.batch_size}"
            )
        if self.compute_pct is not None and not 0 < self.compute_pct < 100:
            raise ConfigError(
                f"compute_pct: expected a number between 0 and 100, got {self.compute_pct:g}"
            )
        check_confidence(self.confidence)
