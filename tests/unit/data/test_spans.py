"""Spans of a text's characters are joined and taken from each other by their borders."""

import pytest

from trainer.data.format.spans import Span, joined, shared_beginning, shared_end, without


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(4, 6), (0, 2)], [(0, 2), (4, 6)]),
        ([(0, 9), (2, 5)], [(0, 9)]),
        ([(0, 4), (3, 7), (6, 8)], [(0, 8)]),
        ([(0, 3), (3, 5)], [(0, 5)]),
        ([], []),
    ],
)
def test_joined_spans_hold_each_character_once(spans: list[Span], expected: list[Span]) -> None:
    assert joined(spans) == expected


def test_what_others_hold_is_taken_out_of_spans() -> None:
    assert without([(0, 10)], [(2, 4), (6, 7)]) == [(0, 2), (4, 6), (7, 10)]
    assert without([(0, 3), (5, 8)], [(2, 6)]) == [(0, 2), (6, 8)]
    assert without([(3, 5)], [(0, 9)]) == []


def test_two_texts_share_a_beginning_and_an_end() -> None:
    assert [shared_beginning("a bee", other) for other in ("a bat", "a bee sings", "b")] == [3, 5, 0]
    assert [shared_end("a bee", other) for other in ("the knee", "one a bee", "b")] == [2, 5, 0]
