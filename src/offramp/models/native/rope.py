"""The frequencies of the rotary positions, and their scaling for longer texts."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from offramp.models.native.config import DecoderConfig


def rotation_tables(
    config: DecoderConfig,
) -> tuple[Float[Tensor, "P Dh"], Float[Tensor, "P Dh"]]:
    """Return cosines and sines at each position; the first half of the sines is negated."""
    with torch.device("cpu"):  # real numbers, even if the parameters are on "meta"
        places = torch.arange(config.max_position_embeddings, dtype=torch.float64)
        angles = torch.outer(places, rotary_frequencies(config))  # (P, Dh / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).float(), torch.cat((-sin, sin), dim=-1).float()


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
