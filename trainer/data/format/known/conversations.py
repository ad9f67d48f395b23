"""Rows that are conversations, in the form of chat templates or of ShareGPT: alone, with two answers or with a label.

The conversion of ShareGPT's rows follows LLaMA-Factory's (llamafactory/data/converter.py)."""

from typing import Any

from trainer.data.format.row_format import (
    MESSAGES,
    TEMPLATED,
    Row,
    RowFormat,
    RowKind,
    Values,
    fit_talks,
    is_label,
    is_talk,
    talk,
    tools,
    with_system,
)


def _read_pair(values: Values) -> Row:
    answers = {name: [values[name]] for name in ("chosen", "rejected")}
    return {"prompt": with_system(values, talk(values)), **answers, "tools": tools(values)}


def _read_labelled(values: Values) -> Row:
    messages = with_system(values, talk(values))
    return {"prompt": messages[:-1], "completion": messages[-1:], "label": values["label"], "tools": tools(values)}


ROW_FORMATS = {
    "chat": RowFormat(("messages", "tools"), "chat", fit_talks("messages"), place=10, wider=("sharegpt", {})),
    "sharegpt": RowFormat(
        ("messages", "system", "tools"),
        "chat",
        fit_talks("messages"),
        lambda values: {"messages": with_system(values, talk(values)), "tools": tools(values)},
        {"messages": ("conversations", "conversation")},
        place=20,
    ),
    "preference_sharegpt": RowFormat(
        ("messages", "chosen", "rejected", "system", "tools"),
        "preference",
        lambda values: is_talk(values.get("messages"), [values.get("chosen")], [values.get("rejected")]),
        _read_pair,
        {"messages": ("conversations", "conversation", "messages")},
        place=80,
    ),
    "labelled_messages": RowFormat(
        ("messages", "label", "system", "tools"),
        "labelled",
        lambda values: is_talk(values.get("messages")) and is_label(values.get("label")),
        _read_labelled,
        {"messages": MESSAGES, "label": ("label", "kto_tag")},
        place=110,
    ),
}


def _renderer(tokenizer: Any, data: Any) -> Any:
    from trainer.data.render.chat import Renderer

    return Renderer(tokenizer, data)


ROW_KINDS = {
    "chat": RowKind(
        _renderer,
        reads=(*TEMPLATED, "drop_system"),
        roles=True,
        trained="assistant",
        has_likelihood=True,
    ),
}
