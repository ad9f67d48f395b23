"""Spans of a text's characters, as [begin, end)."""

from collections.abc import Iterable, Sequence
from itertools import takewhile

Span = tuple[int, int]


def joined(spans: Iterable[Span]) -> list[Span]:
    """The union of the spans, sorted and disjoint."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((start, end))
    return result


def without(spans: Iterable[Span], others: Sequence[Span]) -> list[Span]:
    """The characters of the spans that are in none of the `others`, which are sorted and disjoint."""
    result: list[Span] = []
    for start, end in spans:
        for begin, stop in others:
            if start < stop and begin < end:
                result.append((start, max(start, begin)))
                start = min(end, stop)
        result.append((start, end))
    return [(start, end) for start, end in result if start < end]


def shared_beginning(one: str, other: str) -> int:
    """How many characters both begin with."""
    if other.startswith(one):  # This is the common case, and much faster than to compare each character.
        return len(one)
    return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False)))


def shared_end(one: str, other: str) -> int:
    """How many characters both end with."""
    return shared_beginning(one[::-1], other[::-1])
