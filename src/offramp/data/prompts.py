"""Prompts that a model is to continue: a file of them, or cuts of a text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from offramp.errors import ConfigError, CorpusError
from offramp.reading import JSON_BYTES, parse_json, read_bytes
from offramp.schema import shown

Message = Mapping[str, str]
Prompt = str | tuple[Message, ...]
"""A text to continue, or the messages of a chat, each with ``role`` and ``content``."""
JSON_LINES = (".jsonl", ".ndjson")
"""Ends of the names of files whose lines are JSON."""


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts.

    Each line of a ``.jsonl`` file is a JSON string, or an object with ``prompt`` (a text) or
    ``messages`` (a chat); its other fields are ignored. In any other file each line that is not
    blank is a prompt. Raises CorpusError for a line that is neither, and for a file without any.
    """
    try:
        text = read_bytes(path, at_most=JSON_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CorpusError(f"{path}: expected UTF-8 text, got other bytes") from None
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    found: list[Prompt] = [line.removesuffix("\r") for _, line in lines]
    if path.name.lower().endswith(JSON_LINES):
        found = [_prompt(line, f"{path}, line {n}") for n, line in lines]
    if not found:
        raise CorpusError(f"{path}: expected at least one prompt, got none")
    return found


def _prompt(line: str, place: str) -> Prompt:
    try:
        content = parse_json(line)
    except json.JSONDecodeError as error:
        why = f"{error.msg} at character {error.pos + 1}"
        raise CorpusError(f"{place}: expected JSON, got {shown(line)}: {why}") from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{place}: expected JSON, got {error}") from None
    value = content
    if isinstance(content, dict):
        value = content.get("messages", content.get("prompt"))
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(_is_message(each) for each in value):
        return tuple({"role": each["role"], "content": each["content"]} for each in value)
    got = shown(json.dumps(content, ensure_ascii=False))
    raise CorpusError(
        f"{place}: expected a string, an object with a text in 'prompt', or one with 'messages' of "
        f"'role' and 'content', got {got}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )


def cut_prompts(
    ids: Int[Tensor, " N"], *, tokens: int, first: Sequence[int], at_most: int | None = None
) -> list[list[int]]:
    """Cut a text into prompts of ``tokens`` tokens, each after the ``first`` tokens of a model.

    With ``at_most`` they are spread evenly over the text. A shorter last piece is left out.
    """
    if tokens < 1:
        raise ConfigError(f"prompt_tokens: expected at least 1, got {tokens}")
    whole = len(ids) // tokens
    if not whole:
        raise CorpusError(f"corpus: expected at least {tokens} tokens for a prompt, got {len(ids)}")
    kept = whole if at_most is None else min(at_most, whole)
    starts = torch.linspace(0, whole - 1, kept).long() * tokens
    return [[*first, *ids[start : start + tokens].tolist()] for start in starts.tolist()]
