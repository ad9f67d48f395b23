"""Rows of a text in segments, each of which says whether it is trained; axolotl calls them input_output."""

from typing import Any

from trainer.data.format.row_format import RowFormat, Values


def _fit(values: Values) -> bool:
    given: Any = values.get("segments")
    return isinstance(given, list) and bool(given) and all(isinstance(part, dict) and "text" in part for part in given)


ROW_FORMATS = {"segments": RowFormat(("segments",), "segments", _fit, place=65)}
