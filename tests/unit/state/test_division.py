"""Who holds and who reads which elements of the base, whatever the numbers of ranks and of copies."""

from itertools import pairwise

import pytest

from trainer.state.zero.division import Division


@pytest.mark.parametrize("numel", [1, 5, 6, 7, 24])
@pytest.mark.parametrize(("holders", "copies"), [(1, 1), (3, 1), (1, 3), (2, 2), (4, 3)])
def test_each_element_is_read_once_wherever_a_range_begins(holders: int, copies: int, numel: int) -> None:
    division = Division(holders, copies)
    assert [division.place(division.rank(place)) for place in range(division.readers)] == [*range(division.readers)]
    reads = [division.read_at(place, numel) for place in range(division.readers)]
    assert reads[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(reads))
    assert reads[-1][1] == numel
    for begin in range(numel + 1):
        for end in range(begin, numel + 1):
            expected = [
                (place, max(begin, first), min(end, last))
                for place, (first, last) in enumerate(reads)
                if max(begin, first) < min(end, last)
            ]
            assert list(division.places(begin, end, numel)) == expected
