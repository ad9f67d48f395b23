"""Parameters of the base that are born as ZeRO-3 partitions and filled piece by piece: no rank ever holds a whole
one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.processes.ranks import World
from trainer.state.zero.engine import zero_init
from trainer.state.zero.policy import Scope


@dataclass(frozen=True)
class Partition:
    """One parameter; this rank holds elements [begin, end) of the flat tensor, in `local`."""

    parameter: nn.Parameter
    begin: int
    end: int
    local: Tensor

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
    `room`. Collective.
    """

    def __init__(
        self,
        deepspeed_config: dict[str, Any],
        dtype: torch.dtype,
        scope: Scope,
        ranks: World,
        room: Room = own_room,
    ) -> None:
        self.device, self.room = ranks.device, room
        self.group = _partition_group(scope, ranks)
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.kept_bytes = 0
        self.turns = count()
        """The next number is that of the rank, modulo their number, whose turn it is to read something for all."""
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


def share(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """ZeRO-3's partition: rank r holds elements [r * ceil(n / W), (r + 1) * ceil(n / W)) of the flat tensor, cut at
    n.
    """
    size = ceil(numel / world_size)
    return min(numel, rank * size), min(numel, (rank + 1) * size)
