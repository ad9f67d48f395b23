"""Rows with running text, as a whole or in segments that each say whether they are trained.

axolotl calls rows of segments input_output.
"""

from typing import Any

from trainer.data.format.row_format import RowFormat, RowKind, Values, fit_texts


def _are_segments(values: Values) -> bool:
    given = values.get("segments")
    return isinstance(given, list) and bool(given) and all(isinstance(part, dict) and "text" in part for part in given)


ROW_FORMATS = {
    "text": RowFormat(("text",), "text", fit_texts("text"), place=70),
    "segments": RowFormat(("segments",), "segments", _are_segments, place=65),
}


def _renderer(tokenizer: Any, data: Any) -> Any:
    from trainer.data.render.chat import Renderer

    return Renderer(tokenizer, data)


ROW_KINDS = {
    "text": RowKind(_renderer, reads=(), roles=True, trained="all", has_likelihood=True),
    "segments": RowKind(
        _renderer,
        reads=("tokenize_apart",),
        trained="segments",
        fixed="say themselves what is trained",
        has_likelihood=True,
    ),
}
