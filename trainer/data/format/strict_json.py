"""Reads JSON and refuses objects with a key twice. Python's own reader silently keeps the last of two values."""

import json
from typing import Any


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
