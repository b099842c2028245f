"""The TOML file of a study of one's own; ``own`` makes the study."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp.errors import ConfigError
from offramp.exits.confidence_names import CONFIDENCE_NAMES
from offramp.reading import JSON_BYTES, parsing, read_bytes, value_of
from offramp.schema import shown
from offramp.studies.study.studies import GRID


@dataclass(frozen=True, kw_only=True)
class GridFile:
    """The content of the file of ``offramp study --grid``."""

    name: str = "grid"
    "Name of the study in its results."
    question: str = "Which recipe of the grid is best?"
    "What the study is to answer, in words."
    seeds: int = GRID.seeds
    "Seeds of each recipe."
    tokens: int = GRID.tokens
    "Training tokens of each run, rounded up to whole steps."
    test_tokens: int = GRID.test_tokens
    "Tokens of the test text that are read, from its start."
    tokenizer: str = GRID.tokenizer
    "characters, bytes, bpe:N, or a Hugging Face tokenizer."
    static_layers: tuple[int, ...] | None = None
    "Depths of the static models (default: every depth up to the model's)."
    measures: tuple[str, ...] = GRID.measures
    "Confidence measures by which tokens leave; the first is shown first."
    compared_at: float = GRID.compared_at
    "FLOPs%, of the standard model, at which recipes are tested against static models."
    decoding: bool = False
    "Whether figures are chosen and compared under the cache that decoding has."
    baseline: Mapping[str, Any] | None = None
    "Values of varied fields that belong to one recipe, with which the others are compared."
    model: Mapping[str, Any] = field(default_factory=dict)
    "Fields of DecoderConfig; default: the small model of the other studies."
    training: Mapping[str, Any] = field(default_factory=dict)
    "Fields of TrainConfig; default: the training of the other studies."
    specialise: Mapping[str, Any] | None = None
    "Fields of SpecialiseConfig; without this table exits stay as trained."

    def __post_init__(self) -> None:
        for name in ("name", "question"):
            text = getattr(self, name)
            if not (text.strip() and text.isprintable()):
                raise ConfigError(f"{name}: expected text on one line, got {shown(text)}")
        for name in ("seeds", "tokens", "test_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.compared_at) and 0 < self.compared_at <= 100):
            raise ConfigError(
                f"compared_at: expected a share of the FLOPs in (0, 100], got {self.compared_at:g}"
            )
        if not self.measures or len(set(self.measures)) < len(self.measures):
            raise ConfigError(
                f"measures: expected different confidence measures, got {shown(self.measures)}"
            )
        for name in self.measures:
            if name not in CONFIDENCE_NAMES:
                expected = ", ".join(CONFIDENCE_NAMES)
                raise ConfigError(f"measures: expected some of {expected}, got {shown(name)}")


def read_grid(path: Path) -> GridFile:
    """Read the file of a grid. Raises CheckpointError, which names the file and the field."""
    data = read_bytes(path, at_most=JSON_BYTES)
    with parsing(path, "TOML"):
        content = tomllib.loads(data.decode("utf-8"))
    return value_of(GridFile, content, path)
