"""Alpaca's rows: an instruction, often an input, and one answer, two answers or a labelled answer.

The conversion follows LLaMA-Factory's (llamafactory/data/converter.py)."""

from trainer.data.format.row_format import Row, RowFormat, Values, ask, fit_texts, is_label, says

_INPUT = {"input": ("input", "context")}
_NAMES = {**_INPUT, "output": ("output", "response")}


def _read_pair(values: Values) -> Row:
    answers = {name: [says("assistant", values[name])] for name in ("chosen", "rejected")}
    return {"prompt": ask(values), **answers}


def _read_labelled(values: Values) -> Row:
    return {"prompt": ask(values), "completion": [says("assistant", values["output"])], "label": values["label"]}


ROW_FORMATS = {
    "alpaca": RowFormat(
        ("instruction", "input", "output", "system", "history"),
        "chat",
        fit_texts("instruction", "output"),
        lambda values: {"messages": [*ask(values), says("assistant", values["output"])]},
        _NAMES,
        place=30,
    ),
    "preference_alpaca": RowFormat(
        ("instruction", "input", "chosen", "rejected", "system", "history"),
        "preference",
        fit_texts("instruction", "chosen", "rejected"),
        _read_pair,
        _INPUT,
        place=90,
    ),
    "labelled_alpaca": RowFormat(
        ("instruction", "input", "output", "label", "system", "history"),
        "labelled",
        lambda values: fit_texts("instruction", "output")(values) and is_label(values.get("label")),
        _read_labelled,
        {**_NAMES, "label": ("label", "kto_tag")},
        place=120,
    ),
}
