"""The options of ``offramp evaluate``. Imports no PyTorch and no harness."""

import math
from dataclasses import dataclass

from offramp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which tasks run, on how much of them, and beside what."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags of lm-evaluation-harness, or of YAML files, between commas."""
    limit: float | None = None
    "Read only this many documents of each task; a number below 1 is a share of them."
    num_fewshot: int | None = None
    "Number of solved examples before each question (default: that of the task)."
    batch_size: int = 8
    "Number of texts that are read or decoded together."
    max_length: int | None = None
    "Longest text in tokens (default: the model's longest sequence); a longer one loses its start."
    prefix_token: str | None = None
    """The token before a text that has no context: an id, or a text that is one token (default: the
    model's BOS token, or else its end-of-text token)."""
    apply_chat_template: bool = False
    """Put each question into the model's chat template; solved examples are earlier turns of the
    conversation."""
    system_instruction: str | None = None
    "A text before each question: the system message of a chat template."
    tasks_path: str | None = None
    "A YAML file, or a folder with YAML files, of tasks of your own."
    trust_task_code: bool = False
    """Allow the YAML files of --tasks-path, and built-in tasks that say so, to run code. Without it
    such tasks are refused."""
    bootstrap_iters: int = 1000
    "Number of resamples behind a standard error that has no formula, such as that of perplexity."
    compare: bool = False
    """Put full depth, several thresholds and static models of the first layers (as offramp export
    writes them) side by side."""
    static: tuple[int, ...] | None = None
    """With --compare: the exits that become static models (default: for each threshold, the one
    whose FLOPs are closest)."""

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise ConfigError("tasks: expected names of tasks between commas, got an empty one")
        if self.limit is not None and not (math.isfinite(self.limit) and self.limit > 0):
            raise ConfigError(f"limit: expected a number above 0, got {self.limit}")
        if self.limit is not None and self.limit > 1 and self.limit != int(self.limit):
            raise ConfigError(
                f"limit: expected a whole number of documents, or a share below 1, got {self.limit}"
            )
        least = {"num_fewshot": 0, "batch_size": 1, "max_length": 2, "bootstrap_iters": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ConfigError(f"{name}: expected at least {smallest}, got {value}")
        if self.static is not None and not self.compare:
            raise ConfigError("static: expected none without compare, which shows static models")
