"""The options of ``offramp study`` and ``offramp recipe``. Imports no PyTorch."""

from dataclasses import dataclass

from offramp.errors import ConfigError

WIDEST = 2048
"""Largest width of a model of study scale."""


@dataclass(frozen=True, kw_only=True)
class TextChoice:
    """What to train on, and what to report on."""

    corpus: str
    "The text to train on: pangram, python-docs, hf:DATASET, or a text file or a folder of them."
    test: str | None = None
    """The text to report on (default: the corpus's test split, or its last 10% where it has
    none)."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(TextChoice):
    """The options of ``offramp study``."""

    seeds: int | None = None
    "Seeds of each recipe (default: the study's own, 3)."
    tokens: int | None = None
    "Training tokens of each run (default: the study's own)."
    sizes: tuple[int, ...] | None = None
    """Widths of the models of study scale, multiples of 32 such as 64,96 (default:
    64,96,128,160)."""

    def __post_init__(self) -> None:
        for name in ("seeds", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(sorted(set(self.sizes))))
            if not self.sizes or any(not 32 <= size <= WIDEST or size % 32 for size in self.sizes):
                raise ConfigError(
                    f"sizes: expected multiples of 32 up to {WIDEST}, got "
                    f"{', '.join(map(str, self.sizes)) or 'none'}"
                )


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(TextChoice):
    """The options of ``offramp recipe``."""

    layers: int = 6
    "Depth of the model."
    compute_budget: float = 65.0
    "FLOPs of a token, heads and gates counted, in percent of the standard model's."
    tokens: int = 900 * 32 * 128
    "Training tokens of each run of the recipe; a run of the search has a third of them."
    seeds: int = 3
    "Seeds of the recipe and of the static models."
    tokenizer: str = "characters"
    "characters, bytes, bpe:N, or a Hugging Face tokenizer."
    dim: int = 128
    "Width of the model, a multiple of 32."

    def __post_init__(self) -> None:
        for name in ("tokens", "seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.layers < 2:
            raise ConfigError(f"layers: expected at least 2 for an early exit, got {self.layers}")
        if self.dim < 32 or self.dim % 32:
            raise ConfigError(f"dim: expected a multiple of 32, got {self.dim}")
        if not 0 < self.compute_budget <= 100:
            raise ConfigError(
                f"compute_budget: expected a share of the full model's FLOPs in (0, 100], "
                f"got {self.compute_budget:g}"
            )
