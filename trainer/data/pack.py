"""Best-fit-decreasing bin packing: documents into rows of a fixed number of tokens."""

from collections import defaultdict
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, none of them holding more than `capacity` tokens.

    The longest document goes first, each into the fullest bin that still takes it. Documents of equal length keep the
    order they are given in, so a caller shuffles by permuting its input. Takes about a microsecond a document: the
    room left in open bins is a bit set in one integer, and the best fit its lowest set bit at or above the length.
    """
    assert all(0 < length <= capacity for length in lengths)
    bins: list[list[int]] = []
    bins_with_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = bins_with_room[room].pop()
            if not bins_with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left = room - length
        if left:
            bins_with_room[left].append(chosen)
            rooms |= 1 << left
    return bins
