"""Values of a committed checkpoint, from whatever shards hold them."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from trainer.state.checkpoint.contents import Contents, Key
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.state.checkpoint.shard import Shard, tensors_of, title
from trainer.state.optimizer.optimizer import Interval
from trainer.store.store import PART_BYTES, Buffer, Store


class StateSlice(NamedTuple):
    """Values [begin, end) of one state of a parameter."""

    key: Key
    begin: int
    end: int


def plan_reads(contents: Contents, wanted: Mapping[Key, Interval]) -> Iterator[tuple[int, dict[Key, Interval]]]:
    """(shard, what to read of it) for each shard that holds some of `wanted`; both are intervals by state."""
    holders = {shard for key, interval in wanted.items() for shard in contents.holders(key, *interval)}
    for shard in sorted(holders):
        overlaps: dict[Key, Interval] = {}
        for key, (first, last) in contents.of(shard).items():
            begin, end = wanted.get(key, (0, 0))
            if max(begin, first) < min(end, last):
                overlaps[key] = max(begin, first), min(end, last)
        yield shard, overlaps


def read_elements(
    folder: Store, manifest: CheckpointManifest, wanted: Mapping[Key, Interval]
) -> Iterator[tuple[StateSlice, Buffer]]:
    """Yield every wanted value once, as slices with their bytes. Raises `Damaged` if a shard holds something else than
    its manifest says.

    Only these bytes leave the store: near ones in one request, and a part's worth at a time.
    """
    for number, overlaps in plan_reads(manifest.contents, wanted):
        shard, contents = manifest.shards[number], manifest.contents.of(number)
        tensors = tensors_of(folder, shard, contents)
        batch, ranges, size = list[StateSlice](), list[Interval](), 0
        for key, (begin, end) in overlaps.items():
            if size > PART_BYTES:
                yield from _fetched(folder, shard, batch, ranges)
                batch, ranges, size = [], [], 0
            first = contents[key][0]
            batch.append(StateSlice(key, begin, end))
            ranges.append(tensors[title(key)].byte_range(begin - first, end - first))
            size += key.state.item * (end - begin)
        yield from _fetched(folder, shard, batch, ranges)


def _fetched(
    folder: Store, shard: Shard, slices: list[StateSlice], ranges: list[Interval]
) -> Iterator[tuple[StateSlice, Buffer]]:
    data = folder.get_ranges(shard.key, [begin for begin, _ in ranges], [end for _, end in ranges])
    yield from zip(slices, data, strict=True)
