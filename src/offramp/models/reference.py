"""The same model as ``transformers`` runs it, to compare with."""

from typing import Any

from offramp.errors import UnsupportedArchitectureError
from offramp.models.base import EarlyExitModel
from offramp.models.huggingface.model import HuggingFaceModel
from offramp.models.native.decoder import Transformer
from offramp.models.native.llama import to_transformers


def reference_model(model: EarlyExitModel) -> Any:
    """A ``transformers`` model with the same parameters; None where it has no such architecture.

    The backbone of a Hugging Face model is that model itself.
    """
    if isinstance(model, HuggingFaceModel):
        return model.backbone
    if not isinstance(model, Transformer):
        return None
    try:
        return to_transformers(model)
    except UnsupportedArchitectureError:
        return None
