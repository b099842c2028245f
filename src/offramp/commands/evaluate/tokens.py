"""The token that stands before a text without a context, and the token that ends a text."""

from collections.abc import Mapping
from typing import Any, Literal

from offramp.data.token_names import token_id
from offramp.errors import CheckpointError, ConfigError
from offramp.models.open import OpenedModel
from offramp.reading import read_json

Special = Literal["bos", "eos"]
_ONES = ("tokenizer_config.json", "special_tokens_map.json")


def special_token(opened: OpenedModel, kind: Special) -> int | None:
    """Return the id of the tokenizer's BOS or end-of-text token; None if the model has none.

    The tokenizer's own files come first, as in transformers, then the model's config.
    """
    found = getattr(opened.chat_tokenizer, f"{kind}_token_id", None)
    written = None if found is not None else _written(opened, f"{kind}_token")
    if written is not None:
        found = opened.tokenizer.token_to_id(written)
    if found is None and opened.files is not None:
        found = opened.files.config.get(f"{kind}_token_id")
    if isinstance(found, list):
        found = found[0] if found else None
    if found is None and kind == "eos" and opened.end_tokens:
        found = opened.end_tokens[0]
    known = type(found) is int and 0 <= found < opened.model.vocab_size
    return found if known else None


def _written(opened: OpenedModel, name: str) -> str | None:
    """Return the text of a special token in the tokenizer's files."""
    if opened.files is None:
        return None
    for file in _ONES:
        path = opened.files.tokenizer_folder / file
        stored = read_json(path) if path.is_file() else None
        token: Any = stored.get(name) if isinstance(stored, Mapping) else None
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            return token
        if token is not None:
            raise CheckpointError(f"{path}: {name}: expected a text, got {token!r}"[:300])
    return None


def prefix_token(opened: OpenedModel, written: str | int | None = None) -> int | None:
    """Return the token before a text that has no context: BOS, or else the end-of-text token.

    ``written`` is an id, or a text that is one token. None if the model has neither.
    """
    if written is not None:
        try:
            return token_id(opened.tokenizer, str(written), opened.model.vocab_size)
        except ConfigError as error:
            raise ConfigError(str(error).replace("stop_token:", "prefix_token:", 1)) from None
    bos = special_token(opened, "bos")
    return special_token(opened, "eos") if bos is None else bos
