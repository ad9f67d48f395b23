"""What messages quote and list: whole where it is short, and cut at one place where it is long."""

from trainer.errors import few, shown


def test_a_value_of_a_hundred_characters_is_quoted_whole_and_a_longer_one_is_cut() -> None:
    assert shown("x" * 98) == f"'{'x' * 98}'"
    assert shown("x" * 99) == f"'{'x' * 96}..."
    assert len(shown("x" * 99)) == 100


def test_eight_names_are_listed_and_of_more_their_number() -> None:
    assert few("abcdefgh") == "a, b, c, d, e, f, g, h"
    assert few("abcdefghij") == "a, b, c, d, e, f, g, h and 2 more"
    assert few("") == "none"
