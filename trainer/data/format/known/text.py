"""Rows of running text."""

from trainer.data.format.row_format import RowFormat, fit_texts

ROW_FORMATS = {"text": RowFormat(("text",), "text", fit_texts("text"), place=70)}
