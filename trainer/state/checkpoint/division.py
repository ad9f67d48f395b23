"""How the elements of what learns are divided over a checkpoint's shards: by ZeRO-3's rule, or as a manifest lists them.

A manifest of format 3 writes no intervals, as they follow from shape, number of shards and shard. With a thousand ranks the
list of format 2 took 133 MB.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Interval = tuple[int, int]


class Division(Protocol):
    def intervals(self, shard: int) -> Mapping[str, Interval]:
        """Parameter -> [begin, end) of its flattened elements in shard number `shard`, where it has any."""
        ...

    def holders(self, name: str, begin: int, end: int) -> Iterable[int]:
        """Numbers of the shards that hold some of the elements [begin, end) of a parameter."""
        ...

    def problem(self) -> str | None:
        """Why the shards do not hold every element exactly once; None when they do."""
        ...


@dataclass(frozen=True)
class EvenDivision:
    """ZeRO-3's rule: of n elements, shard r of W holds [r * ceil(n / W), (r + 1) * ceil(n / W)), cut off at n."""

    numels: Mapping[str, int]
    shards: int

    def interval(self, name: str, shard: int) -> Interval:
        numel = self.numels[name]
        length = -(-numel // self.shards)
        return min(numel, shard * length), min(numel, (shard + 1) * length)

    def intervals(self, shard: int) -> Mapping[str, Interval]:
        every = ((name, self.interval(name, shard)) for name in self.numels)
        return {name: (begin, end) for name, (begin, end) in every if begin < end}

    def holders(self, name: str, begin: int, end: int) -> Iterable[int]:
        length = -(-self.numels[name] // self.shards)
        return range(begin // length, -(-end // length)) if begin < end else ()

    def problem(self) -> str | None:
        return None if self.shards else "it names no shard"


@dataclass(frozen=True)
class ListedDivision:
    """Format 2: each shard's intervals as the manifest lists them."""

    numels: Mapping[str, int]
    listed: Sequence[Mapping[str, Interval]]

    def intervals(self, shard: int) -> Mapping[str, Interval]:
        return self.listed[shard]

    def holders(self, name: str, begin: int, end: int) -> Iterable[int]:
        for shard, intervals in enumerate(self.listed):
            first, last = intervals.get(name, (0, 0))
            if max(begin, first) < min(end, last):
                yield shard

    def problem(self) -> str | None:
        found: dict[str, list[Interval]] = {name: [] for name in self.numels}
        for intervals in self.listed:
            for name, interval in intervals.items():
                if name not in found:
                    return f"a shard holds {name}, which has no shape"
                found[name].append(interval)
        for name, intervals in found.items():
            reached = 0
            for begin, end in sorted(intervals):
                if begin != reached or end <= begin:
                    return f"its shards do not hold each element of {name} exactly once: see element {reached}"
                reached = end
            if reached != self.numels[name]:
                return f"its shards hold elements up to {reached} of {name}, which has {self.numels[name]}"
        return None
