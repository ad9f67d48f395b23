"""Rows of a prompt and its completion, as strings or as messages (TRL's conversational data sets), and of a question and its
answer."""

from trainer.data.format.messages import untrained
from trainer.data.format.row_format import Row, RowFormat, Values, fit_talks, fit_texts, says, talk


def _read_question(values: Values) -> Row:
    return {"messages": [says("user", values["question"]), says("assistant", values["answer"])]}


def _read_prompt_messages(values: Values) -> Row:
    prompt = [untrained(message) for message in talk(values, "prompt")]
    return {"messages": [*prompt, *talk(values, "completion")], "tools": values.get("tools")}


ROW_FORMATS = {
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
        _read_prompt_messages,
        ("prompt", "completion"),
        place=50,
    ),
    "question_answer": RowFormat(
        ("question", "answer"),
        "chat",
        fit_texts("question", "answer"),
        _read_question,
        ("question", "answer"),
        place=60,
        wider=("alpaca", {"question": "instruction", "answer": "output"}),
    ),
}
