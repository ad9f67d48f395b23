"""Which elements of a flat parameter a rank holds under ZeRO-3, and which of them it reads when the base is loaded."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple


def share(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """ZeRO-3's partition: rank r holds elements [r * ceil(n / W), (r + 1) * ceil(n / W)) of the flat tensor, cut at
    n.
    """
    size = ceil(numel / world_size)
    return min(numel, rank * size), min(numel, (rank + 1) * size)


class Span(NamedTuple):
    """Elements [begin, end) of a parameter, and the place of the rank that gets them."""

    begin: int
    end: int
    place: int


@dataclass(frozen=True)
class Division:
    """How the base is divided: `holders` consecutive ranks hold one copy of it, and there are `copies` of it.

    All ranks read the base together, whichever copy they hold: a reader reads one of `copies` parts of what its holder
    holds. So each reader has a place, and readers with places that follow each other read what lies together.
    """

    holders: int
    copies: int

    @property
    def readers(self) -> int:
        return self.holders * self.copies

    def place(self, rank: int) -> int:
        """The place of the rank with this number in the world."""
        return rank % self.holders * self.copies + rank // self.holders

    def rank(self, place: int) -> int:
        """The rank at this place."""
        return place % self.copies * self.holders + place // self.copies

    def read_at(self, place: int, numel: int) -> tuple[int, int]:
        """The elements [begin, end) that the reader at this place reads of a parameter of `numel`."""
        holder, copy = divmod(place, self.copies)
        begin, end = share(numel, self.holders, holder)
        first, last = share(end - begin, self.copies, copy)
        return begin + first, begin + last

    def places(self, begin: int, end: int, numel: int) -> Iterator[tuple[int, int, int]]:
        """Yield (place, begin, end) for the readers that read elements [begin, end), each with those that it reads."""
        place = self._place_of(begin, numel)
        while begin < end:
            _, last = self.read_at(place, numel)
            if begin < last:
                yield place, begin, min(end, last)
                begin = last
            place += 1

    def _place_of(self, element: int, numel: int) -> int:
        """The place of the reader that reads this element."""
        holder = element // ceil(numel / self.holders)
        first, last = share(numel, self.holders, holder)
        return holder * self.copies + (element - first) // max(1, ceil((last - first) / self.copies))
