"""Ranks that act in groups: how a group is made, and what the ranks of one agree on without the others."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from trainer.errors import CapstanError, ConfigError
from trainer.processes.ranks import Team, World, join

LIMIT = timedelta(seconds=100)


def groups_apart() -> list[int]:
    """Ranks 0 and 1 have made their group before ranks 2 and 3 begin with theirs, then come one of all ranks and another
    one of two. The sizes of the groups in whose making this rank took part."""
    world, made = join(LIMIT).world, list[int]()
    plain = distributed_c10d._new_process_group_helper

    def counted(size: int, *rest: Any, **more: Any) -> Any:
        made.append(size)
        return plain(size, *rest, **more)

    distributed_c10d._new_process_group_helper = counted
    store = distributed_c10d._get_default_store()
    if world.rank >= 2:
        store.wait(["the first group is made"], LIMIT)
    first = world.group_of(2)
    if world.rank == 0:
        store.set("the first group is made", "")
    assert dist.get_process_group_ranks(first) == [world.rank // 2 * 2, world.rank // 2 * 2 + 1]
    all_of_them = world.group_of(4)
    assert dist.get_process_group_ranks(all_of_them) == [0, 1, 2, 3]
    again = world.group_of(2)
    assert again is not first
    return made


def two_teams() -> dict[str, Any]:
    """What a rank of a team of two gets from its team, and from the world of four."""
    world = join(LIMIT).world
    team = _team(world)
    found: dict[str, Any] = {
        "of the team": [int(row[0]) for row in team.gather(world.rank)],
        "of the world": [int(row[0]) for row in world.gather(world.rank)],
        "total of the team": int(team.total(torch.tensor(world.rank + 1))),
        "total of the world": int(world.total(torch.tensor(world.rank + 1))),
        "first of the team": team.broadcast(world.rank),
        "first of the world": team.world.broadcast(world.rank),
        "objects": team.gather_objects(f"rank {world.rank}"),
    }

    def fail() -> int:
        if world.rank == 2:
            raise ConfigError("the second team has another mistake.")
        return world.rank

    try:
        found["on the first"] = team.on_first(fail)
    except CapstanError as error:
        found["on the first"] = str(error)
    world.broadcast(None)  # the other team has gone on, and still answers
    return found


def _team(world: World) -> Team:
    """This rank's team of two."""
    facts = {**vars(world), "rank": world.rank % 2, "world_size": 2, "group": world.group_of(2)}
    return Team(**facts, world=world)


def optimizers_of_teams() -> float:
    """What an optimizer sums up over its team."""
    from trainer.config import Optim
    from trainer.state.zero.engine import DividedOptimizer

    world = join(LIMIT).world
    learns = torch.nn.Parameter(torch.zeros(1))
    optimizer = DividedOptimizer([{"params": [learns], "lr_ratio": 1.0, "name": "one"}], Optim(), _team(world))
    values = torch.tensor([float(10**world.rank)])
    optimizer._reduce(values, "sum")
    return float(values)
