"""llama.cpp as a peer of ``offramp bench``: the same model, in several weight formats."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.llama_process import (
    PACKAGES,
    LlamaCrashError,
    LlamaError,
    LlamaProcess,
    check_gguf,
    installed,
)
from offramp.commands.bench.methods import Batch, Method, Sample
from offramp.commands.bench.quality import Windows
from offramp.errors import CheckpointError
from offramp.evaluation.trace import perplexity
from offramp.models.open import OpenedModel

_FILE_TYPES = {"f32": "0", "bf16": "32", "q8_0": "7", "q4_1": "3"}
_BYTES = {"f32": 4.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_1": 20 / 32}
"""Bytes of a weight in a matrix of each format, with its part of the scales."""


@dataclass(frozen=True, kw_only=True)
class LlamaFile:
    """A GGUF file with the model of a run, as llama.cpp describes it."""

    path: Path
    file_type: str
    "The number of its format, as in ``_FILE_TYPES``; other numbers for other formats."
    input_weights: int
    "Number of weights of a table of input embeddings that is no LM head; 0 if there is none."


def find_gguf(opened: OpenedModel, config: BenchConfig) -> LlamaFile | None:
    """Return the GGUF file of a model; None if there is none, or if llama.cpp is not installed.

    It is ``config.gguf``, or the packaged file from which the model was made. Raises ConfigError
    without the package if a file was given, CheckpointError for a file that is no GGUF and for that
    of another model, and LlamaCrashError if llama.cpp does not run here.
    """
    path = Path(config.gguf) if config.gguf is not None else None
    if path is not None:
        check_gguf(path)
    elif config.peers and opened.files is not None and installed():
        path = opened.files.backbone.packaged
    if path is None or not config.llama_cpp:
        return None
    process = LlamaProcess()
    try:
        about = process.request("describe", gguf=str(path.absolute()))
    except LlamaCrashError:
        raise
    except LlamaError as error:
        raise CheckpointError(
            f"{path}: expected a GGUF file of a language model, got: {error}"
        ) from None
    finally:
        process.close()
    _check_same_model(path, about, opened)
    model = opened.model
    return LlamaFile(
        path=path.absolute(),
        file_type=about["file_type"],
        input_weights=model.vocab_size * model.hidden_size if about["own_head"] else 0,
    )


def missing_extra(opened: OpenedModel, config: BenchConfig) -> dict[str, str]:
    """Say that llama.cpp could run the packaged model, if it were installed."""
    packaged = opened.files is not None and opened.files.backbone.packaged is not None
    if not (packaged and config.peers and config.llama_cpp) or config.gguf or installed():
        return {}
    return {"llama_cpp": f"expected the packages {PACKAGES}"}


def _check_same_model(path: Path, about: dict[str, Any], opened: OpenedModel) -> None:
    """Raise a CheckpointError for a file of another model: another size, or other tokens."""
    model, tokens = opened.model, about["tokens"]
    for what, expected, got in (
        ("layers", model.num_layers, about["layers"]),
        ("width", model.hidden_size, about["width"]),
        ("vocabulary", model.vocab_size, len(tokens)),
    ):
        if str(expected) != str(got):
            raise CheckpointError(
                f"{path}: expected the model {opened.name} with {what} {expected}, got another "
                f"model with {what} {got or 'unknown'}"
            )
    for token, text in enumerate(tokens):
        own = opened.tokenizer.id_to_token(token)
        if own is not None and own != text:
            raise CheckpointError(
                f"{path}: expected the tokens of {opened.name}, got another model's: token {token} "
                f"is {text!r} instead of {own!r}"
            )


def llama_methods(
    file: LlamaFile, config: BenchConfig, *, windows: Windows, stack: ExitStack
) -> tuple[list[Method], dict[str, str]]:
    """Return llama.cpp's methods, and those that do not run here, with the reason.

    Each format runs in a process of its own, which ``stack`` ends.
    """
    methods, failed = [], {}
    longest = max([config.prompt_tokens + config.max_new_tokens, config.prefill_tokens or 1])
    length = max([longest, *(inputs.shape[1] for inputs, _ in windows)])
    for kind in config.llama_cpp:
        process = LlamaProcess()
        stack.callback(process.close)
        try:
            size = _loaded(process, file, kind, length=length, rows=config.batch_size)
        except LlamaError as error:
            failed[f"llama_cpp_{kind}"] = str(error)
            continue
        read = size - file.input_weights * _BYTES[kind]
        methods.append(_method(process, kind, config, windows, bytes_per_step=read))
    return methods, failed


def _loaded(process: LlamaProcess, file: LlamaFile, kind: str, *, length: int, rows: int) -> float:
    """Load the model in a format, converted first if the file has another one; its bytes.

    A converted file is removed as soon as it is loaded: llama.cpp has it in memory, or keeps it
    open. So it does not outlive a run that is killed later.
    """
    path, threads = file.path, torch.get_num_threads()
    with TemporaryDirectory(prefix="offramp-gguf-", ignore_cleanup_errors=True) as folder:
        if file.file_type != _FILE_TYPES[kind]:
            path = Path(folder) / f"{kind}.gguf"
            source = {"gguf": str(file.path), "kind": kind, "threads": threads}
            process.request("quantise", out=str(path), **source)
        loaded = process.request("load", gguf=str(path), threads=threads, length=length, rows=rows)
    return float(loaded["bytes"])


def _method(
    process: LlamaProcess,
    kind: str,
    config: BenchConfig,
    windows: Windows,
    *,
    bytes_per_step: float,
) -> Method:
    def run(batch: Batch, new: int = config.max_new_tokens) -> Sample:
        return Sample(**process.request("decode", prompts=_plain(batch), new=new))

    def prefill(prompt: Sequence[int]) -> float:
        return run([prompt], 1).first_seconds

    def ppl() -> float:
        total, count = 0.0, 0
        for inputs, targets in windows:
            for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
                losses = process.request("losses", inputs=row, targets=wanted)
                total, count = total + losses["nll"], count + losses["count"]
        return perplexity(total / count)

    return Method(
        name=f"llama_cpp_{kind}",
        run=run,
        foreign=True,
        weights=kind,
        prefill=prefill,
        ppl=ppl if windows else None,
        bytes_per_step=bytes_per_step,
    )


def _plain(batch: Batch) -> list[list[int]]:
    return [[int(token) for token in prompt] for prompt in batch]
