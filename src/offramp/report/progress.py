"""Progress in the terminal: bars with loss, PPL and time left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bars:
    """Bars that are addressed by name; each shows a short text beside its count."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def show(self, name: str, *, done: int, total: int, text: str = "") -> None:
        """Draw or move a bar."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, text=text)
        self._progress.update(self._tasks[name], completed=done, total=total, text=text)

    def drop(self, name: str) -> None:
        """Take a bar away, if there is one."""
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """Bars on this console while the block runs; a console that is no terminal shows none."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield Bars(progress)
