"""The bytes that a rank receives in a step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d  # pyright: ignore[reportPrivateImportUsage]

from tests.dist.assembled import assemble_run
from trainer.config import parse_config
from trainer.data.order.settings import Position
from trainer.train.loop import train

# Method of a process group -> bytes that a rank of n receives, of the bytes of the largest tensor given.
_COLLECTIVES: dict[str, Any] = {
    "all_gather_single": lambda size, n: size * (n - 1) / n,
    "all_gather_single_coalesced": lambda size, n: size * (n - 1) / n,
    "allgather": lambda size, n: size * (n - 1) / n,
    "allgather_coalesced": lambda size, n: size * (n - 1) / n,
    "allreduce": lambda size, n: 2 * size * (n - 1) / n,
    "allreduce_coalesced": lambda size, n: 2 * size * (n - 1) / n,
    "broadcast": lambda size, _: size,
    "reduce": lambda size, _: size,
    "reduce_scatter": lambda size, n: size * (n - 1) / n,
    "reduce_scatter_single": lambda size, n: size * (n - 1) / n,
    "reduce_scatter_single_coalesced": lambda size, n: size * (n - 1) / n,
    "all_to_all_single": lambda size, n: size * (n - 1) / n,
    "alltoall": lambda size, n: size * (n - 1) / n,
    "gather": lambda size, _: size,
    "scatter": lambda size, _: size,
    "send": lambda size, _: size,
}


def step_traffic(config_text: str, fingerprint: str) -> dict[str, Any]:
    """The bytes that this rank receives in the second step, by the group's extent (its own node or not) and the dtype.

    -> {"inside": {dtype: bytes}, "across": {dtype: bytes}, both without pickled objects, "frozen": the ranks that
    frozen parameters are gathered from}
    """
    here = assemble_run(parse_config(config_text), fingerprint)
    begun = [group._get_sequence_number_for_group() for group in distributed_c10d._world.pg_map]  # type: ignore[attr-defined]
    steps = train(here.training(), 0, Position())
    next(steps)
    received: dict[str, dict[str, float]] = {"inside": {}, "across": {}}
    ranks = here.ranks

    def count(group: Any, name: str, tensors: list[Tensor]) -> None:
        nodes = {rank // ranks.ranks_per_node for rank in torch.distributed.get_process_group_ranks(group)}
        largest = max(tensors, key=lambda tensor: tensor.nbytes)
        by_dtype = received["across" if len(nodes) > 1 else "inside"]
        size = _COLLECTIVES[name](largest.nbytes, group.size())
        by_dtype[str(largest.dtype)] = by_dtype.get(str(largest.dtype), 0) + size

    _watch_collectives(count)
    next(steps)
    frozen: list[Any] = [p for p in here.engine.model.parameters() if not p.requires_grad]
    groups = {tuple(torch.distributed.get_process_group_ranks(p.ds_process_group)) for p in frozen}
    return {**received, "begun": begun, "frozen": sorted(groups)}


def _watch_collectives(count: Any) -> None:
    def watch(name: str) -> None:
        plain = getattr(torch.distributed.ProcessGroup, name)

        def watched(group: Any, *arguments: Any, **options: Any) -> Any:
            count(group, name, list(_tensors([*arguments, *options.values()])))
            return plain(group, *arguments, **options)

        setattr(torch.distributed.ProcessGroup, name, watched)

    for name in _COLLECTIVES:
        watch(name)
    # Objects that ranks send each other travel as uint8 too, but they are no traffic of the model's.
    plain_count = count

    def uncount(name: str) -> None:
        plain = getattr(torch.distributed, name)

        def objects(*arguments: Any, **options: Any) -> None:
            nonlocal count
            count = lambda *_: None  # noqa: E731
            plain(*arguments, **options)
            count = plain_count

        setattr(torch.distributed, name, objects)

    for name in ("all_gather_object", "broadcast_object_list"):
        uncount(name)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
