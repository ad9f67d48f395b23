"""JSON beyond Python's own: one canonical text for a tree, and a reader that refuses an object with a key twice.

The hash of the canonical text shows whether a JSON file is whole, and tells settings apart.

Python's own reader silently keeps the last of two values of a key. The elements of an array are read one by one, so
that a file of any size takes the memory of its longest element.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from trainer.errors import DataError


def canonical(tree: Any) -> str:
    """Return the text with sorted keys and without white space."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def digest_of(tree: Any) -> str:
    """Return the SHA-256 of that text, in hexadecimal."""
    return digest_of_text(canonical(tree))


def digest_of_text(text: str) -> str:
    """Return the same digest, from the canonical text itself."""
    return hashlib.sha256(text.encode()).hexdigest()


_FIRST_BYTES = 2**20
_SPACE = re.compile(r"\s*")


class TwiceNamed(ValueError):
    """A JSON object has one key twice, so it is unclear which of the two values is meant."""

    def __init__(self, key: str) -> None:
        super().__init__(f"an object has the key {key!r} twice; keep one of them")


class StrictDecoder(json.JSONDecoder):
    """Decodes JSON texts, and notes a key that one object has twice.

    After `raw_decode` has returned, `twice` is the first such key, or None. `raw_decode` does not raise for it, so that
    a reader of a stream can distinguish it from an incomplete text.
    """

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.twice: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs) and self.twice is None:
            seen = set[str]()
            self.twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        return made

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        self.twice = None
        return super().raw_decode(s, idx)


def loads(text: str | bytes) -> Any:
    """The value of a JSON text. Raises `TwiceNamed` for an object with a key twice, else the errors of `json.loads`."""
    decoder = StrictDecoder()
    value = decoder.decode(text if isinstance(text, str) else text.decode())
    if decoder.twice is not None:
        raise TwiceNamed(decoder.twice)
    return value


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
            twice = None if parser.twice is None else DataError(str(TwiceNamed(parser.twice)))
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
