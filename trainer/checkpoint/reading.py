"""Elements of a committed checkpoint, from whatever shards hold them."""

from collections.abc import Iterator, Mapping, Sequence

from trainer.checkpoint.division import Division, Interval
from trainer.checkpoint.manifest import CheckpointManifest
from trainer.checkpoint.shard import STATES, StateSlice, read_states
from trainer.store import Buffer, Store


def plan_reads(division: Division, wanted: Mapping[str, Interval]) -> Iterator[tuple[int, dict[str, Interval]]]:
    """(shard, what to read of it) for each shard that holds some of `wanted`; both are intervals by parameter."""
    holders = {shard for name, interval in wanted.items() for shard in division.holders(name, *interval)}
    for shard in sorted(holders):
        overlaps: dict[str, Interval] = {}
        for name, (first, last) in division.intervals(shard).items():
            begin, end = wanted.get(name, (0, 0))
            if max(begin, first) < min(end, last):
                overlaps[name] = max(begin, first), min(end, last)
        yield shard, overlaps


def read_elements(
    run: Store, manifest: CheckpointManifest, wanted: Mapping[str, Interval], states: Sequence[str] = STATES
) -> Iterator[tuple[StateSlice, Buffer]]:
    """Every wanted element of `states` once, as slices with their fp32 bytes. Raises `Damaged` where a shard lacks them."""
    for shard, overlaps in plan_reads(manifest.division, wanted):
        slices = [StateSlice(name, state, begin, end) for name, (begin, end) in overlaps.items() for state in states]
        yield from read_states(run, manifest.shards[shard], manifest.division.intervals(shard), slices)
