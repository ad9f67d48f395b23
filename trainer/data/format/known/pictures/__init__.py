"""Conversations with pictures in them, in the forms of OpenAI, Hugging Face, LLaVA, LLaMA-Factory and ms-swift.

The format is never found out by itself: a run asks for it, because it then loads the part of the base that sees.
"""

from typing import Any

from trainer.data.format.row_format import MESSAGES, TEMPLATED, Column, RowFormat, RowKind


def _renderer(tokenizer: Any, data: Any) -> Any:
    from trainer.base.find.processor import check_packages

    check_packages()
    from trainer.data.format.known.pictures.render import PictureRenderer

    return PictureRenderer(tokenizer, data)


ROW_FORMATS = {
    "pictures": RowFormat(
        ("messages", "images", "tools"),
        "pictures",
        lambda values: False,
        names={"messages": MESSAGES, "images": ("images", "image")},
        place=200,
    )
}
ROW_KINDS = {
    "pictures": RowKind(
        _renderer,
        reads=(*TEMPLATED, "drop_system", "images"),
        roles=True,
        trained="assistant",
        has_likelihood=True,
        parted="a picture from its text",
        columns=(Column("pictures", "uint16", "document"), Column("picture", "uint8", "picture", (66,))),
        sees=True,
    ),
}
