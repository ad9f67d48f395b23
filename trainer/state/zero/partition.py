"""Parameters of the base that are born as ZeRO-3 partitions and filled piece by piece: no rank ever holds a whole
one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.processes.ranks import World
from trainer.state.zero.division import Division, Span, share
from trainer.state.zero.engine import zero_init
from trainer.state.zero.policy import Scope

# The room for bytes of all nodes at once, while nodes complete their partitions.
_GATHERED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Partition:
    """One parameter; this rank holds elements [begin, end) of the flat tensor, in `local`."""

    parameter: nn.Parameter
    begin: int
    end: int
    local: Tensor

    @property
    def numel(self) -> int:
        """The elements of the whole tensor."""
        return prod(whole_shape(self.parameter))

    def write(self, offset: int, values: Tensor) -> None:
        """Take this rank's part of `values`, which are the elements from `offset` on. The rest is dropped."""
        first, last = max(self.begin, offset), min(self.end, offset + len(values))
        if first < last:
            self.local[first - self.begin : last - self.begin].copy_(values[first - offset : last - offset])


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter. A ZeRO-3 parameter's own shape is (0,) while it is not gathered."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def let_learn(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Make a parameter of the base learn, in `dtype`. DeepSpeed takes all that learns in one type; families keep some
    parameters in fp32, such as routers, which are multiplied in fp32 in any case. The optimizer's master is always
    fp32.
    """
    for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
        tensor.data = tensor.data.to(dtype)
    parameter.requires_grad_(True)


Room = Callable[[Tensor], Tensor]
"""Gives a partition the memory that it lies over, from the one that DeepSpeed has made for it: of the same size, type
and device.
"""


def own_room(made: Tensor) -> Tensor:
    """Leave a partition where DeepSpeed has put it."""
    return made


class Partitioner:
    """Makes partitions over the ranks that share one copy of the base: all ranks, or those of a node. Each lies in
    `room`. Collective. With `apart` each rank fills its own by itself, or has them filled already.
    """

    def __init__(
        self,
        deepspeed_config: dict[str, Any],
        dtype: torch.dtype,
        scope: Scope,
        ranks: World,
        room: Room = own_room,
        *,
        apart: bool = False,
    ) -> None:
        self.device, self.room, self.apart = ranks.device, room, apart
        self.group = _partition_group(scope, ranks)
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.division = Division(self.size, ranks.world_size // self.size)
        self.place = self.division.place(ranks.rank)
        self.across: dist.ProcessGroup | None = None
        """While the base is read, the ranks that hold the same partitions as this one, one for each copy of it."""
        self._ranks = ranks
        self.begin_reading()
        self.kept_bytes = 0
        self.turns = defaultdict[int, Iterator[int]](count)
        """For each number of ranks that take turns, a counter. Its next number says who reads for all."""
        self._zero = zero_init(deepspeed_config, dtype, ranks.device)

    def make(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Partition:
        """A parameter of `shape`, frozen until a method makes it learn. Its partition is still to be written.

        The `torch.empty` below is as large as the whole tensor, but nothing of it is ever touched, so none of it is
        resident: DeepSpeed only copies this rank's part into the partition that it allocates.
        """
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        if self.group is not None:
            parameter.ds_zero_partition_process_group = self.group  # type: ignore[attr-defined]  # read by the next call
        # The steps of deepspeed.zero.Init for each parameter, without its broadcast of rank 0's data.
        self._zero._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        parameter.data = parameter.data.to(self.device)  # empty by now; DeepSpeed's own are on the device too
        begin, end = share(parameter.ds_numel, self.size, self.rank)  # type: ignore[attr-defined]
        local: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        local.data = self.room(local.data)
        self.kept_bytes += (end - begin) * dtype.itemsize
        return Partition(parameter, begin, end, local[: end - begin])

    def read_part(self, partition: Partition) -> Partition:
        """The part of a partition that this rank reads. Other ranks read the rest."""
        begin, end = share(partition.end - partition.begin, self.division.copies, self.place % self.division.copies)
        part = partition.local[begin:end]
        return Partition(partition.parameter, partition.begin + begin, partition.begin + end, part)

    def share_out(self, partition: Partition) -> None:
        """Complete a partition: each rank of those that hold it gives the part that it has read. Collective."""
        if self.across is None:
            return
        copies, local = self.division.copies, partition.local.view(torch.uint8)
        item = partition.local.element_size()
        own = self.read_part(partition).local.view(torch.uint8)
        size = ceil(len(partition.local) / copies) * item
        whole = len(local) // size if size else 0
        rows, rest = local[: whole * size].view(whole, size), local[whole * size :]
        step = max(1, _GATHERED_BYTES // copies)
        for first in range(0, size, step):
            last = min(size, first + step)
            mine = torch.zeros(last - first, dtype=torch.uint8, device=self.device)
            given = own[first:last]
            mine[: len(given)] = given
            every = mine.new_empty(copies * len(mine))
            dist.all_gather_into_tensor(every, mine, group=self.across)
            found = every.view(copies, len(mine))
            rows[:, first:last] = found[:whole]
            if len(left := rest[first:last]):
                left.copy_(found[whole, : len(left)])

    def begin_reading(self) -> None:
        """Make what only a load needs. Collective."""
        if self.division.copies > 1:
            self.across = self._ranks.group_across(self.size)

    def end_reading(self) -> None:
        """Give back what only a load needs: NCCL keeps memory of the GPU for each group. Collective."""
        if self.across is not None:
            dist.destroy_process_group(self.across)
            self.across = None

    def brought_together(self, part: Partition, numel: int, spans: Sequence[Span]) -> list[tuple[Span, Tensor]]:
        """Those of `spans` that this rank gets, with their bytes, on the CPU. Collective, unless there are no spans.

        Each rank gives its `part` of the parameter, which has `numel` elements. All ranks name the same spans.
        """
        if not spans:
            return []
        item, division = part.local.element_size(), self.division
        to, come = defaultdict[int, list[Tensor]](list), defaultdict[int, list[tuple[int, int]]](list)
        for span in spans:
            begin, end = max(span.begin, part.begin), min(span.end, part.end)
            if begin < end:
                given = part.local[begin - part.begin : end - part.begin]
                to[division.rank(span.place)].append(given.view(torch.uint8))
            if span.place == self.place:
                for place, first, last in division.places(span.begin, span.end, numel):
                    come[division.rank(place)].append((first, last))
        ranks = range(division.readers)
        sent = [given for rank in ranks for given in to[rank]]
        gone = torch.cat(sent).to(self.device) if sent else torch.empty(0, dtype=torch.uint8, device=self.device)
        counts = [item * sum(last - first for first, last in come[rank]) for rank in ranks]
        found = gone.new_empty(sum(counts))
        dist.all_to_all_single(found, gone, counts, [sum(map(len, to[rank])) for rank in ranks])
        own = {
            span: torch.empty((span.end - span.begin) * item, dtype=torch.uint8)
            for span in spans
            if span.place == self.place
        }
        at, values = 0, found.cpu()
        for rank in ranks:
            for first, last in come[rank]:
                span = next(span for span in own if span.begin <= first < span.end)
                size = (last - first) * item
                own[span][(first - span.begin) * item :][:size] = values[at : at + size]
                at += size
        return list(own.items())


def _partition_group(scope: Scope, ranks: World) -> dist.ProcessGroup | None:
    """The ranks that share one copy of the base; None means all ranks. Collective."""
    if scope == "world":
        return None
    if not ranks.have_even_nodes():
        raise ConfigError(
            "sharding.scope: node needs as many ranks on every node, numbered node by node. Change cluster.workers or "
            "where the launcher puts them, or set sharding.scope: world."
        )
    if ranks.ranks_per_node == ranks.world_size:
        return None
    return ranks.group_of(ranks.ranks_per_node)
