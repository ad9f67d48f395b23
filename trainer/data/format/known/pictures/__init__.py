"""Conversations with pictures in them, in the forms of OpenAI, Hugging Face, LLaVA, LLaMA-Factory and ms-swift.

The same conversations may be the prompts of preference pairs and of labelled answers, or have a class. These formats
are never found out by themselves: a run asks for one, because it then loads the base's tower.
"""

from typing import Any

from trainer.base.find.media import modalities
from trainer.data.format.row_format import MESSAGES, TEMPLATED, Column, RowFormat, RowKind


def _of_conversations(tokenizer: Any, data: Any) -> Any:
    _check_packages()
    from trainer.data.format.known.pictures.render import PictureRenderer

    return PictureRenderer(tokenizer, data)


def _of_pairs(tokenizer: Any, data: Any) -> Any:
    _check_packages()
    from trainer.data.format.known.pictures import judged
    from trainer.data.render.answers import pairs_of, read_pair

    return judged.of_answers(tokenizer, data, judged.read_pair, read_pair, pairs_of)


def _of_labelled(tokenizer: Any, data: Any) -> Any:
    _check_packages()
    from trainer.data.format.known.pictures import judged
    from trainer.data.render.answers import labelled_of, read_labelled

    return judged.of_answers(tokenizer, data, judged.read_labelled, read_labelled, labelled_of)


def _of_classes(tokenizer: Any, data: Any) -> Any:
    _check_packages()
    from trainer.data.format.known.pictures import judged
    from trainer.data.render.numbered import ClassifiedRenderer

    return judged.MarkedRenderer(tokenizer, data, judged.read_classified, ClassifiedRenderer, has_answers=False)


def _check_packages() -> None:
    """Raise `ConfigError` without the packages that the other files of this folder import."""
    from trainer.base.find.processor import check_packages

    check_packages()


def _format(kind: str, fields: tuple[str, ...], place: int, **names: tuple[str, ...]) -> RowFormat:
    files = {one.fields[0]: one.fields for one in modalities()}
    return RowFormat((*fields, *files, "tools"), kind, lambda values: False, names={**names, **files}, place=place)


_PROMPT = ("prompt", *MESSAGES)
ROW_FORMATS = {
    "pictures": _format("pictures", ("messages",), 200, messages=MESSAGES),
    "preference_pictures": _format("preference_pictures", ("prompt", "chosen", "rejected"), 210, prompt=_PROMPT),
    "labelled_pictures": _format(
        "labelled_pictures", ("prompt", "completion", "label"), 220, prompt=_PROMPT, label=("label", "kto_tag")
    ),
    "classified_pictures": _format(
        "classified_pictures", ("messages", "label"), 230, messages=MESSAGES, label=("label", "labels")
    ),
    "multilabel_pictures": _format(
        "multilabel_pictures", ("messages", "label"), 240, messages=MESSAGES, label=("label", "labels")
    ),
}
_COLUMNS = (Column("pictures", "uint16", "document"), Column("picture", "uint8", "picture", (66,)))
_READ = (*TEMPLATED, "images", "videos", "sounds")
_UNREAD = {"share_prefix": ", where each answer has the tokens of its prompt to itself"}
ROW_KINDS = {
    "pictures": RowKind(
        _of_conversations,
        reads=(*_READ, "drop_system"),
        roles=True,
        trained="assistant",
        has_likelihood=True,
        parted="a picture from its text",
        columns=_COLUMNS,
        sees=True,
    ),
    "preference_pictures": RowKind(
        _of_pairs,
        (*_READ, "prompt_length"),
        _UNREAD,
        parted="a pair",
        segments=2,
        columns=_COLUMNS,
        objective="dpo",
        sees=True,
    ),
    "labelled_pictures": RowKind(
        _of_labelled,
        _READ,
        _UNREAD,
        parted="an answer",
        segments=2,
        columns=_COLUMNS,
        counters=("desired",),
        objective="kto",
        sees=True,
    ),
    **{
        kind: RowKind(
            _of_classes,
            (*_READ, "labels"),
            trained="label",
            fixed="have a class, which is trained",
            parted="a picture from its class",
            columns=_COLUMNS,
            objective=objective,
            sees=True,
        )
        for kind, objective in (
            ("classified_pictures", "classification"),
            ("multilabel_pictures", "multilabel_classification"),
        )
    },
}
