"""The harness's model ``offramp``: the arguments of ``--model_args`` as a model with exits."""

from typing import Any

import torch

from offramp.calibration.certificate import DTYPES
from offramp.commands.evaluate.model import ScoringModel
from offramp.commands.evaluate.scoring import exits_for, scoring_of
from offramp.commands.evaluate.tokens import prefix_token
from offramp.errors import ConfigError
from offramp.models.model_files import find_model
from offramp.models.open import OpenedModel, open_model
from offramp.schema import shown

AUTOMATIC = 8
"""Batch size for ``auto``."""


class RegisteredModel(ScoringModel):
    """A model of offramp for ``lm_eval --model offramp``.

    Args:
        pretrained: A folder with exits, a Hugging Face checkpoint (a folder, or a name on the hub),
            or ``smollm2-135m``.
        threshold: Confidence at which tokens exit, or one for each exit but the last, such as
            "0.9:0.8". None is full depth.
        confidence: The measure of the threshold.
        missing_kv: ``propagate``, ``recompute`` or ``exact``.
        certificate: A file of ``offramp calibrate``, whose thresholds are used.
        batch_size: Number of texts that run together; ``auto`` is 8.
        max_length: Longest text in tokens.
        prefix_token_id: The token before a text without a context, as an id or a text.
        base: The place of the backbone of a folder of exits.
        bos: ``auto``, ``yes`` or ``no``.
        device: Where to compute; by default, and where there is no GPU, the CPU.
        dtype: Precision, such as float32.
        weights: ``int8`` or ``int4``.
        **unknown: Other arguments of the harness's own models, which are refused.

    Raises:
        ConfigError: An argument is unknown or out of range.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        threshold: Any = None,
        confidence: str | None = None,
        missing_kv: str | None = None,
        certificate: str | None = None,
        batch_size: Any = 1,
        max_batch_size: Any = None,
        max_length: int | None = None,
        prefix_token_id: Any = None,
        base: str | None = None,
        bos: str = "auto",
        device: str | None = None,
        dtype: str | None = None,
        weights: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigError(
                f"model_args: expected pretrained, threshold, confidence, missing_kv, certificate, "
                f"max_length, prefix_token_id, base, bos, dtype or weights, got "
                f"{shown(next(iter(unknown)))}"
            )
        opened = _opened(str(pretrained), base=base, device=device, dtype=dtype, weights=weights)
        opened = opened.with_bos(bos)
        opened.warn_of_bos()
        chosen = {"threshold": _threshold(threshold), "confidence": confidence}
        if missing_kv is not None:
            chosen["missing_kv"] = missing_kv
        exits = exits_for(opened, certificate, chosen)
        if exits.threshold is None:
            opened.model.silence_untrained()  # they are only counted
        scoring = scoring_of(
            opened,
            exits,
            batch_size=_batch_size(batch_size),
            max_length=max_length,
            prefix=prefix_token(opened, prefix_token_id),
        )
        super().__init__(scoring)


def _opened(
    name: str, *, base: str | None, device: str | None, dtype: str | None, weights: str | None
) -> OpenedModel:
    if dtype not in (None, "auto", *DTYPES):
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {shown(dtype)}")
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        device = None  # the harness asks for cuda:0 if its user names no device
    try:
        place = torch.device(device or "cpu")
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(f"device: {device!r} is not available; use cpu") from None
    return open_model(
        find_model(name, base=base),
        device=place,
        dtype=None if dtype in (None, "auto") else getattr(torch, str(dtype)),
        weights=weights,
    )


def _threshold(written: Any) -> Any:
    """Return a threshold as a number, or as one for each exit: 0.9:0.8."""
    if written is None:
        return None
    try:
        numbers = tuple(float(part) for part in str(written).split(":"))
    except ValueError:
        raise ConfigError(
            f"threshold: expected a number, or one for each exit such as 0.9:0.8, got "
            f"{shown(written)}"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def _batch_size(written: Any) -> int:
    if str(written).startswith("auto"):
        return AUTOMATIC
    try:
        size = int(written)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise ConfigError(f"batch_size: expected a whole number above 0, got {shown(written)}")
    return size
