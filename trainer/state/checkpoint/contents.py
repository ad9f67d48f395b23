"""Which values of each state the shards of a checkpoint hold. A value lies with the first element that it belongs to.

A shard's intervals are intervals of elements, by ZeRO-3's rule. A state with one value for a block of elements, or with
a vector of its own, has fewer values; these are divided by the rules of `Contents`. A manifest writes no intervals, as
they follow from shape, number of shards and shard: with a thousand ranks a list of them would take 133 MB.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from trainer.state.optimizer.optimizer import Interval, State


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


class Key(NamedTuple):
    """One state of one parameter."""

    name: str
    state: State


@dataclass(frozen=True)
class Contents:
    """The contents of `shards` shards, by the `division` of elements and each parameter's `states`."""

    division: EvenDivision
    states: Mapping[str, tuple[State, ...]]
    shards: int

    def of(self, shard: int) -> dict[Key, Interval]:
        """The values in shard number `shard`, if it has any, in the order in which they lie there."""
        elements = self.division.intervals(shard)
        found: dict[Key, Interval] = {}
        # Bytes come last, so that all fp32 values are aligned in the file.
        for dtype in ("F32", "U8"):
            for name, states in self.states.items():
                for state in states:
                    if state.dtype == dtype:
                        begin, end = self._interval(Key(name, state), elements.get(name, (0, 0)), shard)
                        if begin < end:
                            found[Key(name, state)] = begin, end
        return found

    def _interval(self, key: Key, elements: Interval, shard: int) -> Interval:
        if key.state.length is not None:
            return self._vector(key).interval(key.name, shard)
        begin, end = elements
        return -(-begin // key.state.block), -(-end // key.state.block)

    def holders(self, key: Key, begin: int, end: int) -> Iterable[int]:
        """The numbers of the shards that hold some of the values [begin, end)."""
        if begin >= end:
            return ()
        if key.state.length is not None:
            return self._vector(key).holders(key.name, begin, end)
        block = key.state.block
        return self.division.holders(key.name, begin * block, (end - 1) * block + 1)

    def _vector(self, key: Key) -> EvenDivision:
        return EvenDivision({key.name: key.state.length or 0}, self.shards)
