"""A row of the table of ``offramp bench``."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """What one way to decode took. Rates count the tokens after the first of each prompt."""

    method: str
    weights: str
    "The format of the weights; ``full`` of the same format, or bits, is the reference."
    bits: int
    "Bits of a weight in this format, without scales."
    tokens_per_s: Mapping[str, float]
    "median, min and max over prompts and repeats."
    ppl: float | None
    "PPL on the run's text; None where it was not measured, or is not finite."
    speedup_vs_hf: float | None
    "Median ratio to transformers' own generate, prompt by prompt; None where it was not timed."
    speedup_vs_full: float
    "Median ratio to offramp at full depth, prompt by prompt."
    speedup_vs_full_worst: float
    "The same of the worst prompt."
    mean_layers: float | None
    "Layers run for each new token; None where another package does not say."
    acceptance_rate: float | None
    "Share of the drafted tokens that were accepted; None where nothing was drafted."
    identical_to_greedy: bool
    "Whether the tokens are those of greedy decoding at full depth."
    predicted_tokens_per_s: float | None
    "The rate that the cost model predicts."
    bytes_per_token: float | None
    "Bytes of weights read for each new token; None where another package does not say."
    limit_tokens_per_s: float | None
    "Memory bandwidth in the same rounds divided by ``bytes_per_token``."
    share_of_limit: float | None
    "Median ratio of the rate to that limit, in the same round."
    first_token_s: float
    "Median seconds until the first token."
    prefill_tokens_per_s: float | None
    """Median tokens per second of the run's longer prompt, until its first token; None where it was
    not timed."""
    runs: int
    "Number of timed runs."
