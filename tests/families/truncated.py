"""The same model with fewer layers, made by ``transformers``."""

from copy import deepcopy
from typing import Any

from offramp.models.huggingface.small import DEPTH


def truncated(lm: Any, layers: int) -> Any | None:
    """Return a model of the first ``layers`` layers; None if there is no such model."""
    config = deepcopy(lm.config)
    depth = config.get_text_config().num_hidden_layers
    fields = config.to_dict()
    for part in (fields, fields.get("text_config") or {}):
        if part.get("num_kv_shared_layers"):  # the layers whose keys are shared would be others
            return None
        for name, value in part.items():
            if isinstance(value, list) and len(value) == depth:
                part[name] = value[:layers]
        part.update({name: layers for name in part if DEPTH.fullmatch(name)})
    try:
        config = type(config).from_dict(deepcopy(fields))
        of_text = fields.get("text_config") or fields
        if getattr(config.get_text_config(), "layer_types", None) != of_text.get("layer_types"):
            return None  # some configs make the last layer another one
        small = type(lm)._from_config(config, attn_implementation=lm.config._attn_implementation)
    except Exception:
        return None
    stored, own = lm.state_dict(), small.state_dict()
    if any(name not in stored or stored[name].shape != own[name].shape for name in own):
        return None
    small.load_state_dict({name: stored[name] for name in own})
    parts = dict(lm.named_modules())
    for path, module in small.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            buffer.copy_(getattr(parts[path], name))
    return small.eval()
