"""Exit heads of a Hugging Face model, and what it does to logits: a factor, and a soft cap."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import UnsupportedArchitectureError
from offramp.models.exit_heads import ExitHead, adapter_of, has_lm_head
from offramp.models.head_kinds import ExitHeadKind
from offramp.models.huggingface.altup import MergedNorm
from offramp.models.huggingface.calls import close
from offramp.models.huggingface.layout import Layout

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


def new_exit_head(layout: Layout, kind: ExitHeadKind) -> ExitHead:
    """Return the head of an exit, equal to the final norm and LM head."""
    weight, altup, size = layout.head.weight, layout.altup, layout.last_state.shape[-1]
    like: Any = {"device": weight.device, "dtype": weight.dtype}
    norm = layout.norm
    own = deepcopy(norm.norm if isinstance(norm, MergedNorm) else norm)
    if altup is not None:
        size //= altup.count
    own = nn.LayerNorm(size, **like) if own is None else own
    adapter = adapter_of(kind, size)
    return ExitHead(
        norm=own if altup is None else MergedNorm(own, altup),
        adapter=None if adapter is None else adapter.to(**like),
        lm_head=deepcopy(layout.head) if has_lm_head(kind) else None,
    ).requires_grad_(True)
