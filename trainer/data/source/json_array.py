"""Reads the elements of a JSON array one by one, so that a file of any size takes the memory of its longest element."""

import codecs
import re
from collections.abc import Callable, Iterator
from typing import Any

from trainer.data.format.strict_json import StrictDecoder, TwiceNamed
from trainer.errors import DataError

_FIRST_BYTES = 2**20
_SPACE = re.compile(r"\s*")


def elements(read: Callable[[int], bytes], longest: int) -> Iterator[tuple[Any, int]]:
    """Yield each element of a JSON array and its number of characters. `read` is like `io.BufferedReader.read`.

    An element in which an object has a key twice comes as a `DataError`.

    Raises:
        ValueError: the file is not exactly one JSON array, or an element has more than `longest` characters.
    """
    decode, parser = codecs.getincrementaldecoder("utf-8-sig")().decode, StrictDecoder()
    text, at, size, whole = "", 0, _FIRST_BYTES, False

    def more() -> None:
        nonlocal text, at, whole
        part = read(size)
        text, at, whole = text[at:] + decode(part, not part), 0, not part

    more()
    if not text.lstrip().startswith("["):
        raise ValueError("it does not begin with an array of JSON")
    at = text.index("[") + 1
    divided = True  # from the element before
    while True:
        at = _behind_space(text, at)
        if not divided and text.startswith(",", at):
            divided, at = True, _behind_space(text, at + 1)
        if text.startswith("]", at):
            break
        if not divided and at < len(text):
            raise ValueError("two elements have no comma between them")
        try:
            element, end = parser.raw_decode(text, at)
        except ValueError:
            if whole:
                raise
            if len(text) - at > longest:
                raise ValueError(f"an element has more than {longest:,} characters") from None
            # Read twice as much each time, because an element is parsed again from its beginning.
            size = max(_FIRST_BYTES, len(text) - at)
            more()
        else:
            twice = parser.twice and DataError(str(TwiceNamed(parser.twice)))
            yield twice or element, end - at
            at, divided = end, False
    at += 1
    while not whole and not text[at:].strip():
        at = len(text)
        more()
    if text[at:].strip():
        raise ValueError("something follows the array")


def _behind_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # as it may be empty
    return match.end()
