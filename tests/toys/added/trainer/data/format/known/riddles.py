"""A toy format of rows: a riddle and what it is about."""

from trainer.data.format.row_format import Row, RowFormat, Values, fit_texts, says


def _read(values: Values) -> Row:
    return {"messages": [says("user", values["riddle"]), says("assistant", values["solution"])]}


ROW_FORMATS = {
    "riddle": RowFormat(("riddle", "solution"), "chat", fit_texts("riddle", "solution"), _read, place=200),
}
