"""The terminal, which gets no escapes or marks from names of folders, models, data sets and metrics."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

from ..texts import plain


class _Plain:
    """What is printed, with what would not be seen written as escapes."""

    def __init__(self, content: ConsoleRenderable):
        self.content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.content, options):
            yield segment if segment.control else Segment(plain(segment.text, lines=True), segment.style)


class _PlainHook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[Any]:
        return [_Plain(content) for content in renderables]


def plain_console(**options: Any) -> Console:
    """
    A console that escapes what would not be seen, terminal escapes for one.

    Args:
        **options:
            Those of [`~rich.console.Console`].
    """
    console = Console(**{"highlight": False, "soft_wrap": True, **options})
    console.push_render_hook(_PlainHook())
    return console
