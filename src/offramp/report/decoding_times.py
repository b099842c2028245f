"""The measured time of decoding of a study's models, as values: a part of timing.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DecodedPolicy:
    """A model of a study at full depth, or at one policy of its frontier.

    What depends on the number of texts in a batch is a mapping from that number.
    """

    label: str
    "Label of its recipe or static model."
    early_exits: bool
    "Whether the model has exits below its last layer."
    confidence: str | None
    "The measure by which tokens leave; None at full depth."
    missing_kv: str | None
    "exact or propagate, as decoding does it; None at full depth."
    threshold: float
    "Score at and above which a token leaves at the first exit; inf at full depth."
    flops_pct: float
    "FLOPs a token, in percent of the standard model's; mean over the seeds."
    ppl: float
    "PPL on the test text; mean over the seeds."
    mean_layers: Mapping[int, float]
    "Mean number of blocks that ran for a decoded token."
    tokens_per_s: Mapping[int, float]
    "Decoded tokens a second, of all texts together; median over the rounds."
    to_standard: Mapping[int, float]
    "The same divided by the standard model's in the same round; median."
    first_token_s: Mapping[int, float]
    "Seconds from the prompts to the first token of each; median over the rounds."
    first_to_standard: Mapping[int, float]
    "The same divided by the standard model's in the same round; median."


@dataclass(frozen=True, kw_only=True)
class DecodingTimes:
    """PPL against the measured time of decoding, for the models of a study's first seed."""

    prompt_tokens: int
    new_tokens: int
    "Tokens that are decoded after each prompt."
    rounds: int
    "Number of rounds; each decodes once with every policy."
    seconds: float
    "Seconds that all this took."
    environment: Mapping[str, Any]
    "The machine, and the number of threads."
    policies: tuple[DecodedPolicy, ...]

    @property
    def batches(self) -> list[int]:
        """The numbers of texts in a batch, ascending."""
        return sorted(self.policies[0].tokens_per_s)
