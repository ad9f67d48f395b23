"""Rows of running text, as a whole or in segments, each of which says whether it is trained; axolotl calls them
input_output.
"""

from trainer.data.format.row_format import RowFormat, Values, fit_texts


def _are_segments(values: Values) -> bool:
    given = values.get("segments")
    return isinstance(given, list) and bool(given) and all(isinstance(part, dict) and "text" in part for part in given)


ROW_FORMATS = {
    "text": RowFormat(("text",), "text", fit_texts("text"), place=70),
    "segments": RowFormat(("segments",), "segments", _are_segments, place=65),
}
