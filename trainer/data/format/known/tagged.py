"""Rows of words, each of which has a tag."""

from trainer.data.format.row_format import RowFormat, Values


def _fits(values: Values) -> bool:
    words, tags = values.get("words"), values.get("tags")
    if not (isinstance(words, list) and isinstance(tags, list) and words and len(words) == len(tags)):
        return False
    return all(isinstance(word, str) for word in words) and all(isinstance(tag, str | int) for tag in tags)


ROW_FORMATS = {
    "tagged": RowFormat(
        ("words", "tags"),
        "tagged",
        _fits,
        names={"words": ("words", "tokens"), "tags": ("tags", "ner_tags", "pos_tags", "labels")},
        place=160,
    ),
}
