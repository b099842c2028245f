"""Progress: bars with loss, PPL and time left in a terminal, a line a minute anywhere else."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from offramp.console import safe_console
from offramp.printable import printable

LINE_EVERY = 60.0
"""Seconds between two lines of a bar where there is no terminal to draw it: a log, say."""


class Bars:
    """Bars that are addressed by name; each shows a short text beside its count."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}

    def show(self, name: str, *, done: int, total: int, text: str = "") -> None:
        """Draw or move a bar."""
        text = printable(text)
        if self._progress.disable:
            self._say(name, f"{done:,} of {total:,}  {text}")
            return
        if name not in self._tasks:
            shown = escape(printable(name))
            self._tasks[name] = self._progress.add_task(shown, total=total, text=escape(text))
        self._progress.update(self._tasks[name], completed=done, total=total, text=escape(text))

    def drop(self, name: str) -> None:
        """Take a bar away, if there is one."""
        self._said.pop(name, None)
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))

    def _say(self, name: str, text: str) -> None:
        now = time.monotonic()
        if now - self._said.setdefault(name, now) >= LINE_EVERY:
            self._said[name] = now
            line = f"{name.strip()}: {text}".rstrip()
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Run(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def ppl(self) -> float: ...


class StudyBars:
    """One bar for a study, and one for each run that is training; ``say`` prints its messages."""

    def __init__(self, drawn: Bars, say: Callable[[str], object]) -> None:
        self.drawn, self.say, self.name = drawn, say, ""
        self.total, self.done = 0, 0

    def on_plan(self, name: str, total: int, tokens: int) -> None:
        """The study begins."""
        self.say(f"{name}: {total} runs, {tokens:,} training tokens in all")
        self.name, self.total, self.done = name, total, 0
        self.drawn.show(name, done=0, total=total, text="runs")

    def on_timing(self, passes: int, tokens: int) -> None:
        """The static models are timed."""
        self.say(f"Timing the static models: {passes} passes over {tokens:,} tokens each")

    def on_decoding(self, policies: int, prompt_tokens: int, new_tokens: int) -> None:
        """Decoding is timed."""
        self.say(
            f"Timing decoding: {policies} models and policies, {prompt_tokens} + {new_tokens} "
            "tokens each"
        )

    def on_progress(self, progress: _Run) -> None:
        """Move the bar of a run."""
        text = f"loss {progress.loss:.3f}  PPL {progress.ppl:.2f}"
        self.drawn.show(
            f"  {progress.name}", done=progress.step, total=progress.total_steps, text=text
        )

    def on_done(self, name: str) -> None:
        """A run is finished."""
        self.done += 1
        self.drawn.drop(f"  {name}")
        self.drawn.show(self.name, done=self.done, total=self.total, text="runs")


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Bars on this console while the block runs; one that is no terminal gets lines."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("passed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield Bars(progress)


@contextmanager
def call_bar(name: str, *, shown: bool) -> Iterator[Callable[..., None]]:
    """One bar for a call from Python, on standard error; or nothing, unless ``shown``.

    Yields what the work calls with (done, total) or (done, total, text).
    """
    if not shown:
        yield lambda *_: None
        return
    with bars(safe_console(stderr=True)) as drawn:
        yield lambda done, total, text="": drawn.show(name, done=done, total=total, text=text)
