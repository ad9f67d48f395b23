"""Rows with a prompt and its completion, with a question and its answer, or with a prompt and several answers.

Prompts and completions are strings or messages (TRL's conversational data sets).

Alpaca's rows have an instruction, often an input, and one answer, two answers or a labelled answer. Their conversion
follows LLaMA-Factory's (llamafactory/data/converter.py).
"""

from typing import Any

from trainer.data.format.messages import untrained
from trainer.data.format.row_format import (
    TEMPLATED,
    Row,
    RowFormat,
    RowKind,
    Values,
    ask,
    fit_talks,
    fit_texts,
    is_label,
    is_talk,
    is_text,
    says,
    talk,
)


def _answers_fit(values: Values) -> bool:
    answers = values.get("answers")
    return (
        isinstance(answers, list) and bool(answers) and (is_text(values.get("prompt")) or is_talk(values.get("prompt")))
    )


def _read_messages(values: Values) -> Row:
    prompt = [untrained(message) for message in talk(values, "prompt")]
    return {"messages": [*prompt, *talk(values, "completion")], "tools": values.get("tools")}


_INPUT = {"input": ("input", "context")}
_ALPACA = {**_INPUT, "output": ("output", "response")}


def _read_alpaca_pair(values: Values) -> Row:
    answers = {name: [says("assistant", values[name])] for name in ("chosen", "rejected")}
    return {"prompt": ask(values), **answers}


def _read_labelled_alpaca(values: Values) -> Row:
    return {"prompt": ask(values), "completion": [says("assistant", values["output"])], "label": values["label"]}


ROW_FORMATS = {
    "answers": RowFormat(("prompt", "answers", "tools"), "answers", _answers_fit, place=35),
    "prompt_completion": RowFormat(
        ("prompt", "completion"),
        "prompt_completion",
        fit_texts("prompt", "completion"),
        names={"completion": ("completion", "response")},
        place=40,
        wider=("alpaca", {"prompt": "instruction", "completion": "output"}),
    ),
    "prompt_completion_messages": RowFormat(
        ("prompt", "completion", "tools"),
        "chat",
        fit_talks("prompt", "completion"),
        _read_messages,
        place=50,
    ),
    "question_answer": RowFormat(
        ("question", "answer"),
        "chat",
        fit_texts("question", "answer"),
        lambda values: {"messages": [says("user", values["question"]), says("assistant", values["answer"])]},
        place=60,
        wider=("alpaca", {"question": "instruction", "answer": "output"}),
    ),
    "alpaca": RowFormat(
        ("instruction", "input", "output", "system", "history"),
        "chat",
        fit_texts("instruction", "output"),
        lambda values: {"messages": [*ask(values), says("assistant", values["output"])]},
        _ALPACA,
        place=30,
    ),
    "preference_alpaca": RowFormat(
        ("instruction", "input", "chosen", "rejected", "system", "history"),
        "preference",
        fit_texts("instruction", "chosen", "rejected"),
        _read_alpaca_pair,
        _INPUT,
        place=90,
    ),
    "labelled_alpaca": RowFormat(
        ("instruction", "input", "output", "label", "system", "history"),
        "labelled",
        lambda values: fit_texts("instruction", "output")(values) and is_label(values.get("label")),
        _read_labelled_alpaca,
        {**_ALPACA, "label": ("label", "kto_tag")},
        place=120,
    ),
}


def _renderer(tokenizer: Any, data: Any) -> Any:
    from trainer.data.render.chat import Renderer

    return Renderer(tokenizer, data)


def _of_answers(tokenizer: Any, data: Any) -> Any:
    from trainer.data.render.answers import AnswersRenderer, alternatives_of, read_alternatives

    return AnswersRenderer(tokenizer, data, read_alternatives, alternatives_of)


ROW_KINDS = {
    "prompt_completion": RowKind(_renderer, reads=("tokenize_apart",), roles=True, has_likelihood=True),
    "answers": RowKind(_of_answers, (*TEMPLATED, "share_prefix"), parted="an answer", has_likelihood=True),
}
