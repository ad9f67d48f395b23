"""Texts with a rating: their format, and a kind of rows with columns of its own."""

from typing import Any

from trainer.data.format.row_format import Column, RowFormat, RowKind


def _renderer(tokenizer: Any, data: Any) -> Any:
    from trainer.data.format.known.rated.render import RatedRenderer

    return RatedRenderer(tokenizer, data)


ROW_FORMATS = {
    "rated": RowFormat(
        ("text", "rating"), "rated", lambda values: isinstance(values.get("rating"), int | float), place=5
    )
}
ROW_KINDS = {
    "rated": RowKind(
        _renderer,
        reads=(),
        trained="all",
        parted="a text from its rating",
        columns=(
            Column("rating", "float32", "document"),
            Column("place", "int32", "token"),
            Column("share", "float16", "target", (2,)),
        ),
        objective="rated",
    )
}
