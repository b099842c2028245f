"""A model, ready to generate: ``offramp generate``."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from offramp.calibration.certificate import Certificate, model_sha256
from offramp.calibration.fitting import load_fitted
from offramp.errors import CertificateError, CheckpointError, ConfigError
from offramp.exits.gate import FittedExits
from offramp.files import read_json
from offramp.generation import GenerateConfig, Generation, generate
from offramp.models.base import EarlyExitModel
from offramp.models.huggingface.exits_file import EXITS_JSON, base_of
from offramp.models.huggingface.library import quiet, transformers
from offramp.models.open import load_decoder
from offramp.models.sources import find_checkpoint


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A model with its tokenizer and what was fitted to its exits."""

    path: Path
    model: EarlyExitModel
    tokenizer: Tokenizer
    fitted: FittedExits
    untrained: bool
    end_tokens: tuple[int, ...]
    "Tokens that end every text of this model."

    def start(self, prompt: str, config: GenerateConfig, *, chat: bool = False) -> Generation:
        """Begin a text; ``chat`` puts the prompt into the model's chat template."""
        ids = self._chat(prompt) if chat else self.tokenizer.encode(prompt).ids
        stops = (*config.stop_tokens, *self.end_tokens)
        return generate(
            self.model,
            ids,
            replace(config, stop_tokens=tuple(dict.fromkeys(stops))),
            tokenizer=self.tokenizer,
            fitted=self.fitted,
        )

    def _chat(self, prompt: str) -> list[int]:
        with quiet():
            try:
                tokenizer = transformers().AutoTokenizer.from_pretrained(
                    _checkpoint(self.path), local_files_only=True
                )
                text = tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            except Exception:  # the library has many kinds
                raise ConfigError(
                    f"chat: expected a model with a chat template, and {self.path} has none"
                ) from None
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def open_generator(
    path: Path, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> Generator:
    """Load any model that ``load_decoder`` takes."""
    model, tokenizer = load_decoder(path, device=device, dtype=dtype)
    untrained = not model.exits.trained
    model.exits.warned = True  # the caller says it
    return Generator(
        path=path,
        model=model,
        tokenizer=tokenizer,
        fitted=load_fitted(path, device=device) if path.is_dir() else FittedExits(),
        untrained=untrained,
        end_tokens=_end_tokens(path),
    )


def under_certificate(
    config: GenerateConfig, path: Path, file: Path, *, missing_kv: str | None
) -> GenerateConfig:
    """The config with a certificate's thresholds; refused for another model or missing_kv."""
    certificate = Certificate.load(file)
    certificate.require_model(model_sha256(path))
    if missing_kv is not None and missing_kv != certificate.missing_kv:
        raise CertificateError(
            f"missing_kv: expected {certificate.missing_kv}, under which the certificate's promise "
            f"was made, got {missing_kv}"
        )
    kept: Any = certificate.missing_kv
    return replace(
        config,
        threshold=certificate.thresholds,
        confidence=certificate.confidence,
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


def _checkpoint(path: Path) -> Path:
    return base_of(path).folder if (path / EXITS_JSON).is_file() else find_checkpoint(path).folder


def _end_tokens(path: Path) -> tuple[int, ...]:
    """What the checkpoint's generation_config.json, or config.json, calls the end of a text."""
    try:
        folder = _checkpoint(path)
    except CheckpointError:
        return ()
    for name in ("generation_config.json", "config.json"):
        stored = read_json(folder / name) if (folder / name).is_file() else {}
        end = stored.get("eos_token_id") if isinstance(stored, dict) else None
        if end is not None:
            return tuple(end) if isinstance(end, list) else (int(end),)
    return ()
