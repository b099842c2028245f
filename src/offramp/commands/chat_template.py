"""The messages of a conversation as a text, by the chat template of the model."""

from collections.abc import Mapping, Sequence
from typing import Any

from offramp.data.hub import one_line
from offramp.data.tokenizer import encode_prompt
from offramp.errors import ConfigError
from offramp.models.huggingface.library import quiet, transformers
from offramp.models.open import OpenedModel

Message = Mapping[str, str]
"""``role``, such as ``user``, ``assistant`` or ``system``, and ``content``."""


def chat_tokenizer(opened: OpenedModel) -> Any:
    """Return the tokenizer of transformers that holds the model's chat template.

    No code of the checkpoint runs. Raises ConfigError for a model without a template.
    """
    with quiet():
        tokenizer = opened.chat_tokenizer
        try:
            if tokenizer is None and opened.files is not None and opened.files.speaks_chat:
                tokenizer = transformers().AutoTokenizer.from_pretrained(
                    opened.files.backbone.folder, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # transformers raises many kinds
            raise ConfigError(
                f"chat: expected a tokenizer that transformers reads, got: {one_line(error)}"
            ) from None
        if getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"chat: expected a model with a chat template, and {opened.name} has none"
            )
    return tokenizer


def messages_text(
    tokenizer: Any, messages: Sequence[Message], *, answer_begun: bool = False
) -> str:
    """Return messages in the chat template, up to where an answer begins.

    With ``answer_begun`` the last message is the beginning of the answer, which the text ends
    with. ``tokenizer`` is that of ``chat_tokenizer``. Raises ConfigError for a template that fails.
    """
    options = {"continue_final_message": True} if answer_begun else {}
    with quiet():
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=not answer_begun,
                **options,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise ConfigError(
                f"chat: expected a chat template that takes these messages, got: {one_line(error)}"
            ) from None
    return str(text)


def message_ids(opened: OpenedModel, tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of messages in the chat template, up to where an answer begins.

    ``tokenizer`` is that of ``chat_tokenizer``. Raises ConfigError for a template that fails.
    """
    text = messages_text(tokenizer, messages)
    return encode_prompt(opened.tokenizer, text, special_tokens=False)


def chat_ids(opened: OpenedModel, prompt: str) -> list[int]:
    """Return the token ids of one message of a user in the model's chat template.

    Raises ConfigError for a model without a template, and for a template that fails.
    """
    message = {"role": "user", "content": prompt}
    return message_ids(opened, chat_tokenizer(opened), [message])
