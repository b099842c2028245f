"""The command ``offramp``. Printing and progress happen here; the library itself is silent.

A user's mistake is one sentence on standard error and exit code 2; Ctrl-C is exit code 130,
SIGTERM 143.
"""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import cyclopts
import torch
from cyclopts import App, Parameter
from rich.console import Console

from offramp.errors import CheckpointError, ConfigError, OfframpError
from offramp.evaluation.sweep import Threshold
from offramp.experiments.reproduce.study import ReproduceConfig
from offramp.experiments.reproduce.study import reproduce as run_reproduction
from offramp.experiments.runs import RunProgress
from offramp.experiments.workflows import TrainRun, resume_run, start_run, sweep_folder
from offramp.experiments.workflows import Watcher as TrainWatcher
from offramp.models.checkpoint import write_json
from offramp.models.transformer import DecoderConfig
from offramp.report.progress import Bars, bars
from offramp.report.sweep import sweep_table
from offramp.report.tables import rich_tables
from offramp.training import Progress, TrainConfig, Validation
from offramp.version import __version__

DEFAULT_THRESHOLDS = "0.5,0.7,0.8,0.9,0.95,0.99"
INTERRUPTED = 130
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
    if get_origin(type_) is tuple:
        tokens = [
            token.evolve(value=part.strip()) for token in tokens for part in token.value.split(",")
        ]
    return cyclopts.convert(type_, tokens)


app = App(
    name="offramp",
    help="Early-exit Transformer language models: train exits and measure them.",
    version=__version__,
    default_parameter=Parameter(
        converter=_convert,
        negative_iterable=(),
        name_transform=lambda field: FLAGS.get(field, cyclopts.default_name_transform(field)),
        parse=re.compile(r"^(?!vocab_size$)"),  # the tokenizer sets it
    ),
)
console = Console(stderr=True)

Device = Annotated[str, Parameter(help="Where to compute: cpu, cuda, cuda:1, mps.")]
Threads = Annotated[int | None, Parameter(help="Threads of PyTorch (default: PyTorch's own).")]
Dtype = Literal["float32", "float64", "bfloat16"]


@app.command
def reproduce(
    config: Annotated[ReproduceConfig | None, Parameter(name="*")] = None,
    *,
    out: Path | None = None,
    device: Device = "cpu",
    threads: Annotated[int, Parameter(help="Threads of each process.")] = 1,
    jobs: int | None = None,
) -> None:
    """Reproduce Experiments 5 and 6 of the seed document, with a verdict on each claim.

    Parameters
    ----------
    out
        Folder for results.json, tables.md and report.html (default: a new one in runs/).
    jobs
        Processes that train at a time (default: one a core).
    """
    config = config or ReproduceConfig()
    use(device, threads)
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs: expected at least 1, got {jobs}")
    out = out or new_folder(Path("runs"), "reproduce")
    with bars(console) as drawn:
        watcher = ReproductionBars(drawn, out)
        try:
            results = run_reproduction(
                config,
                out,
                command=shlex.join(["offramp", *sys.argv[1:]]),
                watcher=watcher,
                jobs=jobs or max(1, (os.cpu_count() or 1) // threads),
                threads=threads,
                device=device,
            )
        except KeyboardInterrupt:
            say(
                f"Stopped. The finished runs ({watcher.done} of {watcher.total} on "
                f"{watcher.corpus}) are kept in {out}; the same command with --out {out} "
                "goes on with the rest."
            )
            raise
    for table in rich_tables(results):
        output().print(table)
    say(f"{results['seconds']:.0f} s. The report: {out / 'report.html'}")


class ReproductionBars:
    """One bar for the corpus, and one for each run under way."""

    def __init__(self, drawn: Bars, out: Path) -> None:
        self.drawn, self.out = drawn, out
        self.corpus, self.total, self.done = "", 0, 0

    def on_corpus(self, name: str, total: int) -> None:
        """A corpus begins."""
        say(f"{name}: {total} training runs into {self.out}")
        self.drawn.drop(self.corpus)
        self.corpus, self.total, self.done = name, total, 0
        self.drawn.show(name, done=0, total=total, text="runs")

    def on_progress(self, progress: RunProgress) -> None:
        """A run goes on."""
        text = f"loss {progress.loss:.3f}  PPL {progress.ppl:.2f}"
        name = f"  {progress.name}"
        self.drawn.show(name, done=progress.step, total=progress.total_steps, text=text)

    def on_done(self, name: str) -> None:
        """A run is finished."""
        self.done += 1
        self.drawn.drop(f"  {name}")
        self.drawn.show(self.corpus, done=self.done, total=self.total, text="runs")


@app.command
def train(
    *,
    corpus: str | None = None,
    out: Path | None = None,
    tokenizer: str | None = None,
    resume: Path | None = None,
    model: Annotated[DecoderConfig | None, Parameter(name="*")] = None,
    training: Annotated[TrainConfig | None, Parameter(name="*")] = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Train a native decoder with exits on a corpus; --corpus and --out, or --resume.

    Parameters
    ----------
    corpus
        pangram, python-docs, hf:DATASET, or a UTF-8 text file or a folder of them.
    out
        Folder for the model: the best by validation, and the last in last/.
    tokenizer
        characters (default), bytes, bpe:N, or a Hugging Face tokenizer.
    resume
        Go on with the unfinished run in this folder; it needs no other flag.
    """
    use(device, threads)
    with bars(console) as drawn, stop_on_signals() as stopped:

        def on_step(progress: Progress) -> None:
            if progress.step % 10 == 0 or progress.step == progress.total_steps:
                ppl = progress.losses[max(progress.losses)].exp()
                text = f"loss {progress.loss:.3f}  PPL {ppl:.2f}"
                drawn.show("train", done=progress.step, total=progress.total_steps, text=text)

        def on_validation(validation: Validation) -> None:
            exits = "  ".join(f"{layer}: {ppl:.3f}" for layer, ppl in validation.exit_ppl.items())
            best = "  (best)" if validation.is_best else ""
            say(f"step {validation.step}  validation PPL by layer  {exits}{best}")

        watcher = TrainWatcher(
            on_step=on_step,
            on_validation=on_validation,
            on_damaged=say,
            should_stop=lambda: stopped() is not None,
        )
        if resume:
            if corpus or out or tokenizer or model or training:
                raise ConfigError(
                    "resume: expected no other flag of the run, which keeps its own, got some"
                )
            folder = resume
            result = resume_run(folder, device=device, watcher=watcher)
        else:
            if corpus is None or out is None:
                raise ConfigError("train: expected --corpus and --out, or --resume; got neither")
            folder = out
            run = TrainRun(
                corpus=corpus,
                tokenizer=tokenizer or "characters",
                model=model or DecoderConfig(),
                training=training or TrainConfig(),
            )
            result = start_run(run, folder, device=device, watcher=watcher)
    if not result.finished:
        say(
            f"Stopped after step {result.step}, which is kept; "
            f"offramp train --resume {folder} goes on."
        )
        sys.exit(128 + (stopped() or signal.SIGINT))
    say(
        f"{folder} holds the best parameters (step {result.best.step}); "
        f"{folder / 'last'} the last (step {result.step})."
    )


@app.command
def sweep(
    model_dir: Path,
    *,
    corpus: str,
    thresholds: Annotated[str, Parameter(allow_leading_hyphen=True)] = DEFAULT_THRESHOLDS,
    out: Path | None = None,
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Dtype = "float32",
) -> None:
    """PPL, Shallow% and Compute% of any number of thresholds, from one pass over a text.

    Parameters
    ----------
    model_dir
        A folder that ``offramp train`` wrote.
    corpus
        The text: pangram, python-docs, hf:DATASET, or a text file or folder. It is read
        whole, or its test split where it has named ones.
    thresholds
        Numbers between commas; one for each exit but the last is written 0.9:0.8.
    out
        Write the table to this JSON file, too.
    dtype
        Precision of the model.
    """
    use(device, threads)
    parsed = parse_thresholds(thresholds)
    if out and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        raise CheckpointError(f"{out}: expected the name of a file in a folder to write into")
    with bars(console) as drawn:
        result = sweep_folder(
            model_dir,
            corpus,
            parsed,
            device=device,
            dtype=getattr(torch, dtype),
            on_tokens=lambda done, total: drawn.show(
                "trace", done=done, total=total, text="tokens"
            ),
        )
    output().print(sweep_table(result.content))
    if result.unfinished:
        say(f"{model_dir}: its run is unfinished; this is its best model so far.")
    if result.unknown_tokens:
        say(
            f"{result.unknown_tokens:,} of the tokens are <unk>: characters that the training "
            "text does not have."
        )
    if out:
        write_json(out, result.content)


def parse_thresholds(text: str) -> list[Threshold]:
    """Thresholds from their written form; 0.9:0.8 is one for each exit but the last."""
    try:
        numbers = [[float(number) for number in part.split(":")] for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"thresholds: expected numbers between commas, such as 0.8,0.95, got {text!r}"
        ) from None
    return [tuple(part) if len(part) > 1 else part[0] for part in numbers]


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 (a user's mistake) or 130 (interrupted)."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (cyclopts.CycloptsError, OfframpError) as error:
        print(f"offramp: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("offramp: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
