"""Generation: decoding at full depth, with confident exits, or speculatively."""

from offramp.generation.confident_exit import MISSING_KV, ExitRule, MissingKV, forced_exits
from offramp.generation.generate import Generation, generate, generate_batch
from offramp.generation.options import GenerateConfig
from offramp.generation.rows import Completion, Token
from offramp.generation.sampling import SamplingConfig

__all__ = [
    "MISSING_KV",
    "Completion",
    "ExitRule",
    "GenerateConfig",
    "Generation",
    "MissingKV",
    "SamplingConfig",
    "Token",
    "forced_exits",
    "generate",
    "generate_batch",
]
