"""Terminals on which nothing but rich's own control sequences has an effect."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

from offramp.printable import printable


def safe_console(**options: Any) -> Console:
    """Return a console of rich that shows the control characters of what it prints."""
    console = _Console(**options)
    console.push_render_hook(_Safe())
    return console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the program end as for any other write to a closed pipe."""
        raise BrokenPipeError


class _Safe(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Wrap everything that is about to be printed."""
        return [_Shown(renderable) for renderable in renderables]


class _Shown:
    """Something to print, whose text is made printable when it is rendered."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text, lines=True), segment.style)
