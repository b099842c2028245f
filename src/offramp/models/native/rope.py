"""The frequencies of the rotary positions, and their scaling for longer texts."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.models.native.config import DecoderConfig


def rotary_frequencies(config: DecoderConfig) -> Float[Tensor, " half"]:
    """Return the angle (Dh / 2,) in float64 by which each pair of a head turns per position.

    Scaling ``linear`` divides every frequency by the factor. Scaling ``llama3`` divides those whose
    wavelength is longer than the original context by it, keeps short ones, and blends between
    them (Llama 3.1). The formulas are those of ``transformers``.
    """
    assert config.head_dim is not None
    exponents = (torch.arange(0, config.head_dim, 2) / config.head_dim).double()
    frequencies: Tensor = config.rope_theta**-exponents
    if config.rope_type == "linear":
        return frequencies / config.rope_factor
    if config.rope_type == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = (config.rope_original_length or 0) * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for short waves, 0 for long ones
        return frequencies * (kept + (1 - kept) / config.rope_factor)
    return frequencies
