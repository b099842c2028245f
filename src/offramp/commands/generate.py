"""Text from an opened model: ``offramp generate``."""

from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from offramp.calibration.thresholds import StoredThresholds
from offramp.data.tokenizer import encode_prompt
from offramp.errors import CertificateError, ConfigError
from offramp.generation.config import GenerateConfig
from offramp.generation.generate import Generation
from offramp.generation.generate import generate as generate_ids
from offramp.models.huggingface.library import quiet, transformers
from offramp.models.open import OpenedModel


def generate(
    opened: OpenedModel, prompt: str, config: GenerateConfig, *, chat: bool = False
) -> Generation:
    """Begin a text; its tokens come as the result is iterated.

    ``chat`` puts the prompt into the model's chat template. The text also ends at the model's
    end tokens.
    """
    ids = chat_ids(opened, prompt) if chat else encode_prompt(opened.tokenizer, prompt)
    stops = (*config.stop_tokens, *opened.end_tokens)
    return generate_ids(
        opened.model,
        ids,
        replace(config, stop_tokens=tuple(dict.fromkeys(stops))),
        tokenizer=opened.tokenizer,
        fitted=opened.fitted,
    )


def chat_ids(opened: OpenedModel, prompt: str) -> list[int]:
    """Token ids of one user message in the model's chat template; ConfigError without one."""
    with quiet():
        try:
            tokenizer = opened.chat_tokenizer
            if tokenizer is None and opened.files is not None:
                tokenizer = transformers().AutoTokenizer.from_pretrained(
                    opened.files.backbone.folder, local_files_only=True
                )
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception:  # transformers raises many kinds
            raise ConfigError(
                f"chat: expected a model with a chat template, and {opened.name} has none"
            ) from None
    return encode_prompt(opened.tokenizer, text, special_tokens=False)


def with_thresholds(
    config: GenerateConfig, stored: StoredThresholds, *, missing_kv: str | None
) -> GenerateConfig:
    """The config with the thresholds of a file; refused under another ``missing_kv``.

    ``missing_kv`` is what the user chose, or None.
    """
    if stored.sha256 is not None and missing_kv not in (None, stored.missing_kv):
        raise CertificateError(
            f"missing_kv: expected {stored.missing_kv}, under which the certificate's guarantee "
            f"was made, got {missing_kv}"
        )
    if config.confidence not in ("max_prob", stored.confidence):
        raise ConfigError(
            f"confidence: expected {stored.confidence}, the measure of the stored thresholds, got "
            f"{config.confidence}"
        )
    kept: Any = missing_kv or stored.missing_kv
    return replace(
        config,
        threshold=stored.thresholds,
        confidence=stored.confidence,
        missing_kv=kept,
    )


def token_id(tokenizer: Tokenizer, written: str) -> int:
    """The id of a stop token, from its text or its number."""
    found = tokenizer.token_to_id(written)
    if found is not None:
        return int(found)
    if written.isdecimal() and int(written) < tokenizer.get_vocab_size():
        return int(written)
    raise ConfigError(f"stop_token: expected a token of the model, got {written!r}")
