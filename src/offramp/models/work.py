"""What decoding asked of a model: which parts ran, how often, and for how many tokens at once."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Work:
    """Counts of calls, by the tokens of a call; those of an exit also by its layer.

    Prompts are not counted.
    """

    blocks: Counter[int] = field(default_factory=Counter)
    "Blocks run, by tokens."
    keys_values: Counter[int] = field(default_factory=Counter)
    "Blocks whose keys and values alone were projected, by tokens."
    heads: Counter[tuple[int, int]] = field(default_factory=Counter)
    "Logits of a layer that were not already read for a question, by (layer, tokens)."
    questions: Counter[tuple[int, int]] = field(default_factory=Counter)
    "Confidence asked at an exit, with all that it reads, by (layer, tokens)."
    drafts: Counter[tuple[int, int]] = field(default_factory=Counter)
    "The same where a draft was asked for its next token."

    @property
    def layers_run(self) -> int:
        """Blocks that tokens ran through."""
        return sum(tokens * count for tokens, count in self.blocks.items())
