"""What the ``config.json`` of a checkpoint says of the computation, and the hashes of its files."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from offramp.data.tokenizer import TOKENIZER_FILE
from offramp.errors import CheckpointError, ConfigError, UnsupportedArchitectureError
from offramp.files import file_sha256
from offramp.models.native.llama import decoder_config
from offramp.models.sources import Source
from offramp.reading import read_json

_WRITTEN_ANEW = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
}
"""Fields of a Hugging Face config that saving changes."""


def computation(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that changes logits.

    Of a Llama-family model it is what the native decoder reads; of others, all but what saving
    changes.
    """
    try:
        return decoder_config(stored, exit_layers=(), exit_head="shared").stored()
    except (UnsupportedArchitectureError, CheckpointError, ConfigError, LookupError, TypeError):
        return {key: value for key, value in stored.items() if key not in _WRITTEN_ANEW}


def file_hashes(source: Source) -> dict[str, str]:
    """Return the SHA-256 of what a checkpoint's config computes, and of its tokenizer."""
    stored = read_json(source.folder / "config.json")
    about = computation(stored) if isinstance(stored, dict) else stored
    written = json.dumps(about, sort_keys=True, default=str).encode()
    found = {"config_sha256": hashlib.sha256(written).hexdigest()}
    tokenizer = source.folder / TOKENIZER_FILE
    if tokenizer.is_file():
        found["tokenizer_sha256"] = file_sha256(tokenizer)
    return found
