"""The tokens that begin every text of a model, such as BOS: one rule for every command.

``auto`` is what the model was trained with: the tokens that its tokenizer's post-processor puts
before a text, or none for a model of ``offramp train``, which is trained on plain windows. Exits
and models of ``offramp tune`` record what they were trained with.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from tokenizers import Tokenizer

from offramp.data.tokenizer import first_tokens
from offramp.errors import ConfigError
from offramp.models.model_files import ModelFiles

Bos = Literal["auto", "yes", "no"]


def check_bos(bos: str) -> None:
    """Raise a ConfigError unless this is auto, yes or no."""
    if bos not in get_args(Bos):
        raise ConfigError(f"bos: expected auto, yes or no, got {bos!r}")


def bos_tokens(
    bos: str,
    tokenizer: Tokenizer,
    files: ModelFiles | None,
    *,
    vocab_size: int,
    plain: bool,
    config: Mapping[str, Any],
) -> tuple[int, ...]:
    """Return the ids that are put before every window and prompt, as context only.

    ``plain`` says that the model was trained on windows without them. ``yes`` takes the tokens of
    the tokenizer, or else the ``bos_token_id`` of ``config``; it raises ConfigError if there is
    neither.
    """
    check_bos(bos)
    known = tuple(id for id in first_tokens(tokenizer) if id < vocab_size)
    if bos == "auto":
        tuned = files is not None and files.kind != "checkpoint"
        trained = files.about.get("trained") if files is not None and tuned else None
        recorded = trained.get("bos") if isinstance(trained, dict) else None
        if recorded is False or (plain and recorded is not True):
            return ()
        bos = "yes" if recorded is True else bos
    if bos == "no":
        return ()
    named = config.get("bos_token_id")
    if bos == "yes" and not known and type(named) is int and 0 <= named < vocab_size:
        known = (named,)
    if bos == "yes" and not known:
        raise ConfigError(
            "bos: expected auto or no, since neither the tokenizer nor config.json names a token "
            "that begins a text, got yes"
        )
    return known
