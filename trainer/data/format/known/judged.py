"""Rows with judged answers: a chosen and a rejected one (TRL's preference data sets), or one answer with a label."""

from typing import Any

from trainer.data.format.row_format import TEMPLATED, RowFormat, RowKind, Values, is_label, is_talk, is_text


def _preference_fits(values: Values) -> bool:
    answers = values.get("chosen"), values.get("rejected")
    return is_text(*answers) or is_talk(*answers)


def _labelled_fits(values: Values) -> bool:
    both = values.get("prompt"), values.get("completion")
    return is_label(values.get("label")) and (is_text(*both) or is_talk(*both))


ROW_FORMATS = {
    "preference": RowFormat(
        ("prompt", "chosen", "rejected", "tools"),
        "preference",
        _preference_fits,
        place=100,
        wider=("preference_alpaca", {"prompt": "instruction"}),
    ),
    "labelled": RowFormat(
        ("prompt", "completion", "label", "tools"),
        "labelled",
        _labelled_fits,
        names={"label": ("label", "kto_tag")},
        place=130,
        wider=("labelled_alpaca", {"prompt": "instruction", "completion": "output"}),
    ),
}


def _of_pairs(tokenizer: Any, data: Any) -> Any:
    from trainer.data.render.answers import AnswersRenderer, pairs_of, read_pair

    return AnswersRenderer(tokenizer, data, read_pair, pairs_of)


def _of_labelled(tokenizer: Any, data: Any) -> Any:
    from trainer.data.render.answers import AnswersRenderer, labelled_of, read_labelled

    return AnswersRenderer(tokenizer, data, read_labelled, labelled_of)


_READ = (*TEMPLATED, "share_prefix")
ROW_KINDS = {
    "preference": RowKind(_of_pairs, (*_READ, "prompt_length"), parted="a pair", segments=2, objective="dpo"),
    "labelled": RowKind(
        _of_labelled,
        _READ,
        parted="an answer",
        segments=2,
        counters=("desired",),
        objective="kto",
    ),
}
