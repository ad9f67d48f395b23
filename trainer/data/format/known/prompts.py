"""Rows with a prompt and its completion, with a question and its answer, or with a prompt and several answers.

Prompts and completions are strings or messages (TRL's conversational data sets)."""

from typing import Any

from trainer.data.format.messages import untrained
from trainer.data.format.row_format import (
    TEMPLATED,
    Row,
    RowFormat,
    RowKind,
    Values,
    fit_talks,
    fit_texts,
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
