"""Tables and bars for the terminal.

They send no control characters but rich's own, read no text as markup, and cut nothing off.
"""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from launcher.view.terminal import visible
from trainer.errors import StorageError


def time_left() -> TimeRemainingColumn:
    """Return the column for how long a bar still takes. No narrow terminal cuts it off beside `description`."""
    return TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=len("0:00:00")))


def description() -> TextColumn:
    """Return the column for what a bar is about, in several lines if it is long.

    rich takes the width of columns that do not wrap from all of them alike.
    """
    return TextColumn("{task.description}", table_column=Column(no_wrap=False))


def progress_bars(*more: ProgressColumn, shown: bool | None = None, transient: bool = False) -> Progress:
    """Show bars on stderr, each with what it is about, `more` about it, and the time that is left.

    By default they are shown if stderr is a terminal.
    """
    console = Terminal(stderr=True)
    disable = not (console.is_terminal if shown is None else shown)
    columns = (description(), BarColumn(20), *more, time_left())
    return Progress(*columns, console=console, transient=transient, disable=disable)


_NARROWEST = 40
"""Columns that a terminal is taken to have at least: in none, as COLUMNS=0 says, rich shows nothing."""


class Terminal(Console):
    """A console that sends no control characters but its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, **options})
        self.width = max(self.width, _NARROWEST)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(visible(text), style)


class FoldedTable(Table):
    """A table that wraps a cell if its column is narrow, at a space or inside a word.

    So commands and names stay whole.
    """

    def add_column(self, *args: Any, **options: Any) -> None:
        super().add_column(*args, **{"overflow": "fold", **options})

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(Text(visible(cell)) if isinstance(cell, str) else cell for cell in cells), **options)


def facts() -> FoldedTable:
    """Return a table without lines, for rows of a name and a text."""
    table = FoldedTable(box=None, show_header=False, padding=(0, 2), pad_edge=False, collapse_padding=True)
    table.add_column(style="bold")
    table.add_column()
    return table


def outdated(shown: RenderableType, error: StorageError) -> RenderableType:
    """Return what was shown last, with a sentence that says why it is not shown as it is now."""
    return Group(shown, Text(f"the store does not answer, so this is not as it is now: {error}", "red"))
