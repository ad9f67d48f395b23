"""Keepers on the machines of a Ray cluster (`launcher.start.keeper`): an actor on each, outside of the group of ranks.

A child of a rank's own actor would end with that. So a worker of Ray Train asks the actor of its machine for the
keeper, has its rank forked from that, and waits for the rank's end. All these actors belong to one near the driver,
which also knows on which machine each rank was: the next start numbers its ranks so that they find what they have left.

A spare machine (`cluster.spares`) is one with a keeper and without ranks.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launcher.cluster.ray.cluster import Need, alive_nodes, other_nodes, room
from launcher.start.keeper import Keeper, OwnKeeper, Unprepared
from trainer.config import Config
from trainer.errors import ConfigError, counted

_ANSWER_SECONDS = 60.0
_SPARE_SECONDS = 1.0
_FREED_SECONDS = 10.0
"""Within so long the room of ranks that have ended is free again."""


def keepers_on_ray(gpus_per_worker: int | None) -> Any:
    """Return the actor that has the keepers of all machines. It ends with this process."""
    import ray

    # One that is killed takes the keepers along, and is started again without them.
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(_Keepers).options(scheduling_strategy=on_node(this_node()), **options).remote(gpus_per_worker)


def keeper_here(keepers: Any, rank: int) -> Keeper:
    """Return the keeper of this machine, on which the rank of this number is. Raises `Unprepared`."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    node = this_node()
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


def check_spares(config: Config) -> None:
    """Raise `ConfigError` if the run would leave no machine of its cluster as a spare."""
    if config.cluster.spares and config.cluster.workers is None:
        raise ConfigError(
            f"cluster.spares: {config.cluster.spares} is not possible without cluster.workers: the run has a rank on"
            " each GPU of the cluster then, and no machine is left to wait. Set cluster.workers, the number of ranks."
        )


@dataclass
class _Spare:
    """The reservation of a machine, and the node on which it has a keeper, by Ray's id."""

    group: Any
    prepared: str | None = None

    @property
    def node(self) -> str | None:
        """The node that is reserved now, by Ray's id. If it is lost, Ray looks for another one."""
        from ray.util import placement_group_table

        return placement_group_table(self.group)["bundles_to_node_id"].get(0) if self.group.wait(0) else None

    def give_up(self) -> None:
        from ray.util import remove_placement_group

        remove_placement_group(self.group)


class Places:
    """The machines of the ranks and the spares, as the driver chooses them from one start to the next.

    A spare is reserved by a placement group of what the ranks of a machine need, which makes an autoscaling cluster add
    a machine. It is given up when the ranks lose one of theirs. `log` gets what becomes of the spares. Nothing that Ray
    does not answer here ends the run.
    """

    def __init__(self, keepers: Any, spares: int, log: Callable[[str], None]) -> None:
        self._keepers, self._count, self._log = keepers, spares, log
        self._ranks = list[str]()
        """The node of each rank of the newest start, by Ray's ids; empty until they train."""
        self._home = set[str]()
        """The nodes on which ranks of the next start find a keeper."""
        self._places = 0
        """The ranks for which there is room at home."""
        self._spares = list[_Spare]()

    def close(self) -> None:
        while self._spares:
            self._spares.pop().give_up()

    def begun(self, wanted: Need) -> None:
        """Reserve what is missing of the spares, and have keepers wait there. The ranks train."""
        from ray.exceptions import GetTimeoutError, RayError

        with suppress(RayError, GetTimeoutError):
            self._begun(wanted)

    def _begun(self, wanted: Need) -> None:
        import ray
        from ray.util import placement_group

        if not self._ranks:
            self._ranks = list(ray.get(self._keepers.nodes.remote(), timeout=_ANSWER_SECONDS))
            self._home, self._places = set(self._ranks), len(self._ranks)
        nodes = [spare.node for spare in self._spares]
        for spare, node in zip(self._spares, nodes, strict=True):
            if node is not None and spare.prepared != node:
                spare.prepared = node
                self._keepers.prepare.remote(node)
                self._log(f"cluster.spares: {alive_nodes().get(node, node)} waits with a keeper")
        if len(nodes) < self._count and None not in nodes:
            most = max(Counter(self._ranks).values())
            machine = {name: amount * most for name, amount in wanted.each.items()}
            others: Any = other_nodes([*self._home, *filter(None, nodes)])
            self._spares.append(_Spare(placement_group([machine], bundle_label_selector=[others])))
            if not self._spares[-1].group.wait(_SPARE_SECONDS):
                self._log(
                    f"cluster.spares: no machine without ranks has room for {counted(most, 'rank')} now; one that comes"
                    " is taken"
                )

    def stand_in(self, without: Collection[str]) -> None:
        """Give up a spare for each machine of the ranks that is lost, or is one of those `without`."""
        alive = alive_nodes()
        for lost in [node for node in self._home if node not in alive or node in without]:
            # Ray may answer differently when it is asked again.
            nodes = ((spare, spare.node) for spare in self._spares)
            found = next(((spare, node) for spare, node in nodes if node is not None and node in alive), None)
            if found is None:
                return
            spare, node = found
            self._spares.remove(spare)
            spare.give_up()
            self._home = (self._home - {lost}) | {node}
            self._log(f"cluster.spares: {alive[node]} takes the place of a machine of the ranks")

    def others(self, wanted: Need, ranks: int, without: Sequence[str]) -> Sequence[str]:
        """Return the nodes that the next start leaves out, by Ray's ids, so that its ranks find their keepers.

        They are those `without`, and those that have no keeper if there is room on the others.
        """
        self._ranks = []
        nodes = alive_nodes()
        if ranks != self._places or not self._home <= nodes.keys():
            return without
        others = [*without, *(node for node in nodes if node not in self._home and node not in without)]
        deadline = time.monotonic() + _FREED_SECONDS
        while room(wanted.each, others) < ranks:
            if time.monotonic() > deadline:
                return without
            time.sleep(0.2)
        return others


class _Machine:
    """The actor of a machine. Its child is the keeper, which Ray starts in the actor's main thread."""

    def __init__(self, gpus_per_worker: int | None) -> None:
        import os

        # Ray hides the GPUs from an actor without any. The imports of a rank would then choose the CPU for good.
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        self._gpus_per_worker = gpus_per_worker
        self._keeper = OwnKeeper(gpus_per_worker)

    def name(self) -> str:
        if self._keeper.is_gone():  # the next ranks have another one, which has imported everything by the start after
            self._keeper = OwnKeeper(self._gpus_per_worker)
        return self._keeper.name


class _Keepers:
    """The actor that has those of all machines."""

    def __init__(self, gpus_per_worker: int | None) -> None:
        self._gpus_per_worker = gpus_per_worker
        self._machines = dict[str, Any]()
        self._ranks = dict[int, str]()
        self._order = list[int]()
        self._nodes = list[str]()

    def machine(self, node: str, rank: int) -> Any:
        """Return the actor of the node with this id, which has the rank of this number."""
        self._ranks[rank] = node
        return self.prepare(node)

    def prepare(self, node: str) -> Any:
        """Return the actor of the node with this id, which is started if there is none."""
        import ray

        if node not in self._machines:
            made = ray.remote(_Machine).options(num_cpus=0, scheduling_strategy=on_node(node))
            self._machines[node] = made.remote(self._gpus_per_worker)
        return self._machines[node]

    def forget(self, node: str) -> None:
        self._machines.pop(node, None)

    def number(self, nodes: Sequence[str]) -> list[int]:
        """Return the numbers of the next start's ranks, by the id of the node of each."""
        self._order, self._ranks, self._nodes = numbered(nodes, self._ranks), {}, list(nodes)
        return self._order

    def nodes(self) -> list[str]:
        """Return the id of the node of each rank of the newest start."""
        return self._nodes

    def order(self) -> list[int]:
        """Return what `number` has returned last."""
        return self._order


def this_node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def on_node(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)
