"""Best-fit-decreasing bin packing: documents into rows of a fixed number of tokens."""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray


def best_fit_decreasing(lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    """The bin of each document, (documents,) int64; no bin holds more than `capacity` tokens.

    `lengths` (documents,) must be sorted in descending order. Each document goes into the fullest bin that still has
    room for it. Documents of equal length keep their order, so a caller shuffles by permuting them.

    Documents of one length are placed together: once the fullest bin has taken the first of them, it is still the
    fullest bin for the next one, as long as it has room. So each bin that a length visits costs one search in the
    sorted list of rooms (tokens left): about 0.2 microseconds a document, whatever the capacity.
    """
    assert lengths.size == 0 or 0 < lengths[-1] <= lengths[0] <= capacity
    bins: list[int] = []
    num_bins = 0
    rooms: list[int] = []  # sorted, each once
    bins_with_room: dict[int, list[int]] = {}
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms[place]
                same = bins_with_room[room]
                chosen = same.pop()
                if not same:
                    del rooms[place], bins_with_room[room]
            else:
                room, chosen = capacity, num_bins
                num_bins += 1
            taken = min(count, room // length)
            bins += [chosen] * taken
            count -= taken
            left = room - taken * length
            if left in bins_with_room:
                bins_with_room[left].append(chosen)
            elif left:
                bins_with_room[left] = [chosen]
                insort(rooms, left)
    return np.array(bins, np.int64)
