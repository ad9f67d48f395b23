"""The numbers of a start's ranks: each finds what the one of its number has left on its machine."""

import pytest

from launcher.cluster.ray.keepers import numbered


@pytest.mark.parametrize(
    ("nodes", "before", "numbers"),
    [
        ("ab", {}, [0, 1]),
        ("ab", {0: "a", 1: "b"}, [0, 1]),
        ("ba", {0: "a", 1: "b"}, [1, 0]),
        ("ca", {0: "a", 1: "b"}, [1, 0]),
        ("cb", {0: "a", 1: "b"}, [0, 1]),
        ("ccaa", {0: "a", 1: "a", 2: "b", 3: "b"}, [2, 3, 0, 1]),
        ("aab", {0: "b", 1: "a", 2: "a"}, [1, 2, 0]),
        # The ranks of a node have consecutive numbers.
        ("aab", {0: "a", 1: "b", 2: "a"}, [0, 1, 2]),
        # Of a larger world before, numbers that are not there any more are nobody's.
        ("b", {0: "a", 1: "b"}, [0]),
    ],
)
def test_ranks_are_numbered_by_what_their_machines_keep(nodes: str, before: dict[int, str], numbers: list[int]) -> None:
    assert numbered(list(nodes), before) == numbers
