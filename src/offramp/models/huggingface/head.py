"""What a Hugging Face model does to the output of its LM head: a factor, and a soft cap."""

from typing import Any

import torch
from torch import Tensor

from offramp.errors import UnsupportedArchitectureError
from offramp.models.huggingface.layout import Layout, close

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def scaled(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return the logits times a factor, and below a soft cap."""
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def after_head(config: Any, layout: Layout) -> tuple[float, float | None]:
    """Return the factor and the soft cap that the model applies to the output of its head."""
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None))), None)
    said = layout.logits
    for ways in ((scale, softcap), (1.0, softcap), (1.0, None)):  # the config's values first
        if close(scaled(layout.head_output.float(), *ways).to(said.dtype), said):
            return ways
    raise UnsupportedArchitectureError(
        f"{config.model_type}: unknown computation between the LM head and the logits, so logits "
        "at exits cannot be computed"
    )
