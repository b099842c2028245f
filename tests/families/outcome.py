"""What offramp says about a family when it is opened."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from configs import model_of

from offramp.errors import UnsupportedArchitectureError
from offramp.models.huggingface.exits_file import from_pretrained
from offramp.models.huggingface.model import HuggingFaceModel

GROUPS = {
    "blocks": "block by block, with a cache",
    "no cache": "block by block, without a cache",
    "whole": "only as a whole",
    "refused": "refused",
    "broken": "not checked: transformers cannot make a small model",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A family's group, the reason, its model as offramp opens it, and the plain one."""

    group: str
    why: str = ""
    model: HuggingFaceModel | None = None
    lm: Any = None


@lru_cache(maxsize=2)
def outcome_of(name: str) -> Outcome:
    """Open a small random model of a family or variant."""
    try:
        lm = model_of(name)
    except Exception as error:  # nothing of offramp runs here but ``small_config``
        return Outcome(group="broken", why=" ".join(str(error).split()))
    try:
        model = from_pretrained(lm, exit_layers=(1, 2))
    except UnsupportedArchitectureError as error:
        return Outcome(group="refused", why=str(error), lm=lm)
    model.silence_untrained()
    try:
        with torch.no_grad():
            lm(input_ids=torch.arange(3, 47)[None])
    except Exception as error:  # this is the plain model
        return Outcome(group="broken", why=" ".join(str(error).split()))
    if model.why_no_blocks:
        return Outcome(group="whole", why=model.why_no_blocks, model=model, lm=lm)
    try:
        model.make_cache(1, 8)
    except UnsupportedArchitectureError as error:
        return Outcome(group="no cache", why=str(error), model=model, lm=lm)
    return Outcome(group="blocks", model=model, lm=lm)
