"""The prompts and options of ``calibrate --on generation``. Imports no PyTorch."""

from dataclasses import dataclass, field
from typing import get_args

from offramp.errors import ConfigError
from offramp.generation.config import MISSING_KV, MissingKVChoice
from offramp.models.missing_kv import EXACT

__all__ = ["Prompts", "WriteConfig"]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts as token ids, and where they come from."""

    ids: list[list[int]] = field(repr=False)
    sha256: str
    "Hash of the file or text that they were taken from."
    about: str
    "How they were taken, such as ``cuts of 64 tokens``."


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """How the texts are written that ``calibrate --on generation`` compares."""

    max_prompts: int = 200
    "Largest number of prompts."
    prompt_tokens: int = 64
    "Number of tokens of a prompt that is cut from a text."
    max_new_tokens: int = 64
    "Largest number of new tokens of each text, at least 2: the first one never leaves early."
    missing_kv: MissingKVChoice = "propagate"
    "How keys and values above an exit are computed, as in later use."
    rows: int = 8
    "Number of texts that are written at once, which changes the speed only."
    steps: int = 20
    "Number of thresholds on the path, from careful to bold; testing stops at the first failure."

    def __post_init__(self) -> None:
        least = {"max_prompts": 1, "prompt_tokens": 1, "max_new_tokens": 2, "rows": 1, "steps": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(
                    f"{name}: expected at least {smallest}, got {getattr(self, name)}"
                )
        if self.missing_kv not in (*MISSING_KV, EXACT):
            expected = " or ".join(get_args(MissingKVChoice))
            raise ConfigError(f"missing_kv: expected {expected}, got {self.missing_kv!r}")
