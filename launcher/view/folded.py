"""A table for the terminal that cuts nothing off."""

from typing import Any

from rich.table import Table


class FoldedTable(Table):
    """A table that wraps a cell where its column is narrow, at a space or inside a word, so that commands and names stay whole."""

    def add_column(self, *args: Any, **options: Any) -> None:
        super().add_column(*args, **{"overflow": "fold", **options})
