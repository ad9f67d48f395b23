"""Reads the elements of a JSON array one by one, so that a file of any size takes the memory of its longest element."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

_FIRST_BYTES = 2**20
_SPACE = re.compile(r"[\s,]*")


def elements(read: Callable[[int], bytes], longest: int) -> Iterator[tuple[Any, int]]:
    """Each element of the array that `read` gives the bytes of, as `io.BufferedReader.read` does, and how many characters it has.

    Raises:
        ValueError: this is no array of JSON, or an element has more than `longest` characters.
    """
    decode, parse = codecs.getincrementaldecoder("utf-8-sig")().decode, json.JSONDecoder().raw_decode
    text, at, size, whole = "", 0, _FIRST_BYTES, False

    def more() -> None:
        nonlocal text, at, whole
        part = read(size)
        text, at, whole = text[at:] + decode(part, not part), 0, not part

    more()
    if not text.lstrip().startswith("["):
        raise ValueError("it does not begin with an array of JSON")
    at = text.index("[") + 1
    while True:
        match = _SPACE.match(text, at)
        at = match.end() if match else at
        if text.startswith("]", at):
            return
        try:
            element, end = parse(text, at)
        except ValueError:
            if whole:
                raise
            if len(text) - at > longest:
                raise ValueError(f"an element has more than {longest:,} characters") from None
            # Twice as much each time: an element is parsed again from its beginning.
            size = max(_FIRST_BYTES, len(text) - at)
            more()
        else:
            yield element, end - at
            at = end
