"""Tables for the terminal that cut nothing off, and take no text for markup."""

from typing import Any

from rich.table import Table
from rich.text import Text

from launcher.view.terminal import visible


class FoldedTable(Table):
    """A table that wraps a cell where its column is narrow, at a space or inside a word, so that commands and names
    stay whole.
    """

    def add_column(self, *args: Any, **options: Any) -> None:
        super().add_column(*args, **{"overflow": "fold", **options})

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(Text(visible(cell)) if isinstance(cell, str) else cell for cell in cells), **options)


def facts() -> FoldedTable:
    """A table without lines, for rows of a name and what there is to say."""
    table = FoldedTable(box=None, show_header=False, padding=(0, 2), pad_edge=False, collapse_padding=True)
    table.add_column(style="bold")
    table.add_column()
    return table
