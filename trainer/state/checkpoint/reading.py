"""Values of a committed checkpoint, from whatever shards hold them."""

from collections.abc import Iterator, Mapping

from trainer.state.checkpoint.contents import Contents, Key
from trainer.state.checkpoint.division import Interval
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.state.checkpoint.shard import StateSlice, read_states
from trainer.store.store import Buffer, Store


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
    """Every wanted value once, as slices with their bytes. Raises `Damaged` where a shard lacks them."""
    for shard, overlaps in plan_reads(manifest.contents, wanted):
        slices = [StateSlice(key, begin, end) for key, (begin, end) in overlaps.items()]
        yield from read_states(folder, manifest.shards[shard], manifest.contents.of(shard), slices)
