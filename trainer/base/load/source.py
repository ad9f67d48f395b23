"""The sources of the ranks' shares of the base.

A load has three parts: the shapes, from the files' headers and the settings (`find_weights`, `load_model`); the room
for this rank's share of each parameter (placement.py); and the reading, which a source does. A source that already has
the bytes in memory may also provide the room.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from trainer.base.base import Base
from trainer.base.load.cache import BaseCache
from trainer.base.load.placement import Placement
from trainer.base.partitions.reading import run_jobs
from trainer.processes.ranks import World
from trainer.state.zero.partition import Room, own_room


class ShareSource(Protocol):
    """Gives each rank the bytes of its share."""

    @property
    def room(self) -> Room:
        """The memory in which the partitions lie."""
        ...

    def fill(self, placement: Placement, world: World, log: Callable[[str], None]) -> int:
        """Fill all partitions. Returns the bytes that this rank has read from a store. Collective.

        Raises:
            CapstanError: on every rank, if one cannot read a tensor.
        """
        ...


@dataclass(frozen=True)
class Files:
    """The base's own files. Weights are quantized on the way if necessary."""

    base: Base
    room: Room = own_room

    def fill(self, placement: Placement, world: World, log: Callable[[str], None]) -> int:
        before = self.base.store.range_bytes
        run_jobs(placement.jobs(), world, log)
        return self.base.store.range_bytes - before


@dataclass(frozen=True)
class Cached:
    """The quantized base of another start (`quant.cache`). Weights that are not quantized come from the files."""

    base: Base
    cache: BaseCache
    room: Room = own_room

    def fill(self, placement: Placement, world: World, log: Callable[[str], None]) -> int:
        stores = (self.base.store, self.cache.store)
        before = sum(store.range_bytes for store in stores)
        run_jobs(placement.jobs(self.cache.sources), world, log)
        return sum(store.range_bytes for store in stores) - before
