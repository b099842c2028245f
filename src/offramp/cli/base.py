"""What the commands share: the app, how it reads values, and how it speaks."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import cyclopts
import torch
from cyclopts import App, Parameter
from rich.console import Console

from offramp.calibration.certificate import Certificate
from offramp.calibration.thresholds import StoredThresholds
from offramp.cli.config_file import read_config_file
from offramp.errors import CheckpointError, ConfigError
from offramp.models.model_files import find_model
from offramp.models.open import OpenedModel, open_model
from offramp.version import __version__

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
FLAGS = {  # a config's field: its flag, where they differ
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv-heads",
    "intermediate_size": "hidden",
    "exit_layers": "exits",
    "max_position_embeddings": "max-length",
}


def _convert(type_: Any, tokens: Sequence[cyclopts.Token]) -> Any:
    """Cyclopts' own conversion, with a list written as one word: 2,4."""
    for token in tokens if type_ in (int, int | None) else ():
        if not re.fullmatch(r"\s*[+-]?[0-9_]+\s*", token.value):
            raise cyclopts.CoercionError(token=token, target_type=int)
    if any(
        get_origin(part) is tuple for part in (type_, *get_args(type_))
    ):  # a list, or perhaps none
        tokens = [
            token.evolve(value=part.strip()) for token in tokens for part in token.value.split(",")
        ]
    return cyclopts.convert(type_, tokens)


app = App(
    name="offramp",
    help="Early-exit Transformer language models: train exits and measure them.",
    version=__version__,
    config=read_config_file,
    default_parameter=Parameter(
        converter=_convert,
        negative_iterable=(),
        name_transform=lambda field: FLAGS.get(field, cyclopts.default_name_transform(field)),
        parse=re.compile(r"^(?!vocab_size$)"),  # the tokenizer sets it
    ),
)
console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")

Device = Annotated[str, Parameter(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Threads = Annotated[int | None, Parameter(help="Threads of PyTorch (default: PyTorch's own).")]
Dtype = Literal["float32", "float64", "bfloat16"]


def use(device: str, threads: int | None) -> None:
    """Check that the device is there, and set the threads."""
    try:
        torch.zeros(1, device=device).item()
        if torch.device(device).type == "cpu" and torch.device(device).index:
            raise RuntimeError(device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ConfigError(f"device: expected one that is here, such as cpu, got {device}") from None
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)


def open_for(
    name: str | Path,
    *,
    device: str,
    dtype: str | None,
    stored: StoredThresholds | Certificate | None = None,
) -> OpenedModel:
    """Open a command's model once; a file of thresholds for another model is refused first."""
    files = find_model(name)
    if stored is not None:
        stored.require_model(files.sha256)
    opened = open_model(files, device=device, dtype=getattr(torch, dtype) if dtype else None)
    opened.model.exits.warned = True  # the command itself says so
    return opened


def say(text: str) -> None:
    """A line on standard error, beside the bars."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def output() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)


def new_folder(parent: Path, name: str) -> Path:
    """The first of parent/name-1, parent/name-2, ... that is not there yet."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


def check_out_file(out: Path | None) -> None:
    """Refuse, before any work, an --out that cannot be a file."""
    if out and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        raise CheckpointError(f"{out}: expected the name of a file in a folder to write into")


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], int | None]]:
    """Yield a question: which signal came, Ctrl-C's or SIGTERM? The second ends it at once."""
    came: int | None = None

    def remember(number: int, _: object) -> None:
        nonlocal came
        if came is not None:
            raise KeyboardInterrupt
        came = number

    before = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
