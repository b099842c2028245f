"""What offramp says about a family when it is opened."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from configs import model_of

from offramp.errors import UnsupportedArchitectureError
from offramp.models.huggingface.exits_file import from_pretrained
from offramp.models.huggingface.model import HuggingFaceModel

GROUPS = {
    "blocks": "Everything: block by block, with a cache",
    "no cache": "Block by block, without a cache",
    "whole": "Only as a whole",
    "refused": "Refused",
    "broken": "Not checked, since transformers cannot make the model",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A family's group, the reason, its model as offramp opens it, and the plain one."""

    group: str
    why: str = ""
    model: HuggingFaceModel | None = None
    lm: Any = None


@cache
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
    if model.why_no_blocks:
        return Outcome(group="whole", why=model.why_no_blocks, model=model, lm=lm)
    try:
        model.make_cache(1, 8)
    except UnsupportedArchitectureError as error:
        return Outcome(group="no cache", why=str(error), model=model, lm=lm)
    return Outcome(group="blocks", model=model, lm=lm)
