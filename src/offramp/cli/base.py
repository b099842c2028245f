"""What the commands share: common flags, how the model is opened, and how they speak.

Imports no PyTorch.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from offramp.calibration.certificate import Certificate
from offramp.calibration.thresholds import StoredThresholds
from offramp.cli.app import is_first_process
from offramp.cli.interrupts import work_begins
from offramp.console import safe_console
from offramp.errors import CheckpointError, ConfigError
from offramp.models.native.schemes import Scheme, in_words
from offramp.options import check_processes

if TYPE_CHECKING:
    from offramp.generation.config import GenerateConfig
    from offramp.models.open import OpenedModel

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
if os.environ.get("COLUMNS") == "0":  # of which rich would make lines without characters
    del os.environ["COLUMNS"]
UNTRAINED = (
    "its exits were never trained by offramp, so they know little unless the checkpoint itself was "
    "trained with exits, as LayerSkip's are"
)
console = safe_console(stderr=True, quiet=not is_first_process())

Model = Annotated[
    Path,
    Parameter(
        help="A folder that offramp train, tune or quantise wrote, a Hugging Face checkpoint (a "
        "folder, or a name on the hub), or smollm2-135m."
    ),
]
Base = Annotated[
    Path | None,
    Parameter(
        help="The place of the model's backbone (a folder, or a name on the hub), if MODEL holds "
        "exits whose backbone was moved."
    ),
]
Exits = Annotated[
    tuple[int, ...] | None,
    Parameter(
        help="Exit layers of a Hugging Face checkpoint, such as 4,8; they use its final norm and "
        "LM head (default: each quarter of the depth). A folder of offramp has its own."
    ),
]
Text = Annotated[
    str,
    Parameter(
        help="The text: pangram, python-docs, hf:DATASET, or a text file or folder; its test "
        "split if it has named splits, else all of it."
    ),
]
Out = Annotated[Path | None, Parameter(help="Also write the figures to this JSON file.")]
Device = Annotated[str, Parameter(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Threads = Annotated[int | None, Parameter(help="Threads of PyTorch (default: PyTorch's own).")]
Precision = Literal["float32", "float64", "bfloat16"]
BosName = Literal["auto", "yes", "no"]
Bos = Annotated[
    BosName,
    Parameter(
        help="Begin every window and prompt with the model's first token, such as BOS. auto: as "
        "its tokenizer says, or as its exits were trained; no for a model of offramp train."
    ),
]
Dtype = Annotated[Precision, Parameter(help="Precision of the model.")]
Weights = Annotated[
    Scheme | None,
    Parameter(
        help="Quantise the weights of attention, MLP and LM heads to 8 or 4 bits (LM heads always "
        "to 8) when the model is loaded; --dtype is then the precision of everything else. Only "
        "for models that the native decoder runs. offramp quantise keeps the result."
    ),
]


def use(device: str, threads: int | None) -> None:
    """Check that the device is there, and set the threads; the command's work begins after it."""
    import torch

    try:
        torch.zeros(1, device=device).item()
        if torch.device(device).type == "cpu" and torch.device(device).index:
            raise RuntimeError(device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ConfigError(f"device: {device!r} is not available; use cpu") from None
    if threads is not None:
        check_processes(threads=threads)
        torch.set_num_threads(threads)
    work_begins()


def open_for(
    name: str | Path,
    *,
    base: str | Path | None = None,
    exits: tuple[int, ...] | None = None,
    drafting: "GenerateConfig | None" = None,
    device: str,
    dtype: str | None,
    weights: Scheme | None = None,
    bos: BosName = "auto",
    stored: StoredThresholds | Certificate | None = None,
) -> "OpenedModel":
    """Open a command's model once; a file of thresholds for another model is refused first.

    ``exits`` are exit layers of a plain checkpoint, which has none of its own; without them the
    draft exit of ``drafting`` is the only one, if that names one.
    ``bos`` auto is that of the stored thresholds, or else what the model was trained with.
    ``dtype`` None is the precision of the stored thresholds, or else that of the model's files.
    """
    import torch

    from offramp.models.loading import own_dtype
    from offramp.models.model_files import find_model
    from offramp.models.open import open_model

    files = find_model(name, base=base)
    if exits is not None and files.kind != "checkpoint":
        raise ConfigError(f"exits: expected none, since {name} has its own, got {listed(exits)}")
    if exits is None and files.kind == "checkpoint" and drafting and drafting.speculative:
        drafts = files.draft_exit if drafting.draft_exit is None else drafting.draft_exit
        exits = None if drafts is None else (drafts,)
    chosen = dtype or (stored.dtype if stored else None)
    opened = open_model(
        files,
        exit_layers=exits,
        device=device,
        dtype=getattr(torch, chosen) if chosen else None,
        weights=weights,
    )
    if dtype is None and stored and opened.dtype != own_dtype(files):
        say(f"{name}: runs in {stored.dtype}, in which its thresholds were found.")
    if bos == "auto" and stored:
        bos = "yes" if stored.bos else "no"
    opened = opened.with_bos(bos)
    if stored is not None:
        stored.require_model(opened.sha256, weights=opened.weights)
        stored.require_bos(bool(opened.first_tokens))
        stored.warn_of_dtype(opened.precision)
    opened.warn_of_bos()
    if opened.weights is not None:
        say(f"{name}: {in_words(opened.weights)}; everything else in {opened.precision}.")
    opened.model.silence_untrained()  # the command itself says so
    if opened.unfinished:
        say(
            f"{name}: its training run is unfinished; this is its best model so far. Continue it "
            f"with: offramp train --resume {quote(str(name))}"
        )
    return opened


def listed(layers: tuple[int, ...]) -> str:
    """Layers as they are typed: 4,8."""
    return ",".join(map(str, layers))


def say(text: str) -> None:
    """A line on standard error, beside the bars."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def output() -> Console:
    """Standard output: as wide as the terminal; COLUMNS or 80 characters where it is none."""
    return safe_console(width=None if sys.stdout.isatty() else _columns())


def _columns() -> int:
    written = os.environ.get("COLUMNS", "")
    return int(written) if written.isdecimal() and int(written) > 0 else 80


def say_verdict(sentence: str) -> None:
    """Print a result's last sentence on standard output, unwrapped."""
    output().print(sentence, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def token_bar(name: str, *, unit: str = "tokens") -> Iterator[Callable[[int, int], None]]:
    """A progress bar; yields what a pass over a text calls with (units done, units in all)."""
    from offramp.report.progress import bars

    with bars(console) as drawn:
        yield lambda done, total: drawn.show(name, done=done, total=total, text=unit)


def warn(model: Path, corpus: str, about: Mapping[str, object]) -> None:
    """Say what makes the figures of a text better or worse than they should be."""
    if about.get("seen_in_training"):
        say(
            f"{corpus}: the model or its exits were trained on this text, so the figures are "
            "optimistic."
        )
    if about.get("untrained"):
        say(f"{model}: {UNTRAINED}.")
    if about.get("unknown_tokens"):
        say(
            f"{about['unknown_tokens']:,} of the tokens are <unk>: characters or words that the "
            "tokenizer does not have."
        )


def new_folder(parent: Path, name: str) -> Path:
    """The first of parent/name-1, parent/name-2, ... that is not there yet."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


def check_out_file(out: Path | None) -> None:
    """Refuse, before any work, an --out that cannot be a file; a device or a pipe may be one."""
    if out is None:
        return
    try:
        special = out.exists() and not out.is_file()
        place = out if special else Path(os.path.realpath(out)).parent
        writable = not out.is_dir() and os.access(place, os.W_OK)
    except (OSError, ValueError):  # a name that is too long, or no name
        writable = False
    if not writable:
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
