"""Keepers on the machines of a Ray cluster (`launcher.start.keeper`): an actor on each, outside of the group of ranks.

A child of a rank's own actor would end with that. So a worker of Ray Train asks the actor of its machine for the
keeper, has its rank forked from that, and waits for the rank's end. All these actors belong to one near the driver,
which also knows on which machine each rank was: the next start numbers its ranks so that they find what they have left.
"""

from collections.abc import Sequence
from typing import Any

from launcher.start.keeper import Keeper, OwnKeeper, Unprepared

_ANSWER_SECONDS = 60.0


def keepers_on_ray(gpus_per_worker: int | None) -> Any:
    """Return the actor that has the keepers of all machines. It ends with this process."""
    import ray

    return ray.remote(_Keepers).options(num_cpus=0, scheduling_strategy=_on(_this_node())).remote(gpus_per_worker)


def keeper_here(keepers: Any, rank: int) -> Keeper:
    """Return the keeper of this machine, on which the rank of this number is. Raises `Unprepared`."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    node = _this_node()
    try:
        machine: Any = ray.get(keepers.machine.remote(node, rank), timeout=_ANSWER_SECONDS)
        return Keeper(ray.get(machine.name.remote(), timeout=_ANSWER_SECONDS))
    except (RayError, GetTimeoutError) as error:
        keepers.forget.remote(node)  # the next start has another one
        raise Unprepared(f"the keeper of this machine does not answer ({type(error).__name__})") from None


def numbered(nodes: Sequence[str], before: dict[int, str]) -> list[int]:
    """Return a number for each rank, by the node that each is on and by those on which ranks were `before`.

    A rank on a node gets the number of one that was there. The ranks of a node have consecutive numbers; if that cannot
    be, they are numbered in their order.
    """
    numbers = dict[int, int]()
    left = set(range(len(nodes)))
    for place, node in enumerate(nodes):
        if found := sorted(rank for rank, there in before.items() if there == node and rank in left):
            numbers[place] = found[0]
            left.discard(found[0])
    rest = iter(sorted(left))
    result = [numbers[place] if place in numbers else next(rest) for place in range(len(nodes))]
    of_nodes = {node: [rank for rank, there in zip(result, nodes, strict=True) if there == node] for node in nodes}
    if all(ranks == list(range(ranks[0], ranks[0] + len(ranks))) for ranks in of_nodes.values()):
        return result
    return list(range(len(nodes)))


class _Machine:
    """The actor of a machine. Its child is the keeper, which Ray starts in the actor's main thread."""

    def __init__(self, gpus_per_worker: int | None) -> None:
        import os

        # Ray hides the GPUs from an actor without any. The imports of a rank would then choose the CPU for good.
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        self._keeper = OwnKeeper(gpus_per_worker)

    def name(self) -> str:
        return self._keeper.name


class _Keepers:
    """The actor that has those of all machines."""

    def __init__(self, gpus_per_worker: int | None) -> None:
        self._gpus_per_worker = gpus_per_worker
        self._machines = dict[str, Any]()
        self._ranks = dict[int, str]()
        self._order = list[int]()

    def machine(self, node: str, rank: int) -> Any:
        """Return the actor of the node with this id, which has the rank of this number."""
        import ray

        self._ranks[rank] = node
        if node not in self._machines:
            made = ray.remote(_Machine).options(num_cpus=0, scheduling_strategy=_on(node))
            self._machines[node] = made.remote(self._gpus_per_worker)
        return self._machines[node]

    def forget(self, node: str) -> None:
        self._machines.pop(node, None)

    def number(self, nodes: Sequence[str]) -> list[int]:
        """Return the numbers of the next start's ranks, by the id of the node of each."""
        self._order, self._ranks = numbered(nodes, self._ranks), {}
        return self._order

    def order(self) -> list[int]:
        """Return what `number` has returned last."""
        return self._order


def _this_node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)
