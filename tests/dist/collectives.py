"""The collectives of a step in the order in which each rank begins them, and NCCL's rules, by which such orders come to
an end or do not.

gloo's collectives have threads of their own and end in any order. NCCL's are kernels: those of a communicator run one
behind the other, each takes a place on its device from its beginning until every rank of its group has come to it, and
a device has a bounded number of places. The host begins them without waiting, but where it reads a value of the device
all that it has begun must have ended.

    python -m tests.dist.collectives [WORD ...]     the table of all kinds of steps, or of those whose names have a WORD: a release script
"""

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.dist import teaching, traffic
from tests.dist.assembled import assemble_run
from tests.dist.launch import launch
from tests.material import Workshop, make_base, make_labelled, make_pairs
from trainer.config import dump_config, parse_config
from trainer.data.order.settings import Position
from trainer.train.loop import train
from trainer.train.supply import stored_teacher


class Begun(NamedTuple):
    """A collective that a rank begins: its communicator by name, the ranks of that, the operation, and the bytes of its
    largest tensor.
    """

    communicator: str
    members: tuple[int, ...]
    operation: str
    size: int


READS: None = None
"""In the place of a collective: the host waits for all that it has begun."""
Order = Sequence[Begun | None]


def recorded(runs: list[list[str]]) -> list[list[Any]]:
    """What this rank begins in the second step of each run, given as its settings and the fingerprint of its data."""
    log, found = list[Any](), list[list[Any]]()

    def begin(group: Any, name: str, tensors: list[torch.Tensor]) -> None:
        members = torch.distributed.get_process_group_ranks(group)
        log.append([group.group_name, members, name, max(tensor.nbytes for tensor in tensors)])

    traffic._watch_collectives(begin)
    for method in ("item", "tolist", "cpu"):
        _note_reads(method, log)
    for settings, fingerprint in runs:
        here = assemble_run(parse_config(settings), fingerprint)
        here.stream.teacher = stored_teacher(here.start(), fingerprint, here.stream.chapters.reads)
        steps = train(here.training(), 0, Position())
        next(steps)
        log.clear()
        next(steps)
        found.append(list(log))
    return found


def _note_reads(method: str, log: list[Any]) -> None:
    plain = getattr(torch.Tensor, method)

    def noted(tensor: torch.Tensor, *arguments: Any, **given: Any) -> Any:
        log.append(None)
        return plain(tensor, *arguments, **given)

    setattr(torch.Tensor, method, noted)


def orders_of(found: Sequence[Sequence[Any]]) -> list[Order]:
    """The orders of all ranks, as `recorded` gives them."""
    return [[item and Begun(item[0], tuple(item[1]), item[2], item[3]) for item in rank] for rank in found]


class _Device:
    """A rank: what its host is at, what it has begun and has not started on the device, and what runs there."""

    def __init__(self, order: Order) -> None:
        self.order, self.place = order, 0
        self.waiting: list[Begun] = []
        self.running: dict[str, int] = {}  # communicator -> the number of its collective
        self.started: dict[str, int] = defaultdict(int)

    def advance(self, places: int, pick: Callable[[list[Begun]], list[Begun]]) -> list[tuple[Begun, int]]:
        """Let the host begin what it may and the device start what it has places for: those that start now, with their
        numbers.
        """
        while self.place < len(self.order):
            item = self.order[self.place]
            if item is None and (self.waiting or self.running):
                break
            if item is not None:
                self.waiting.append(item)
            self.place += 1
        heads = {one.communicator: one for one in reversed(self.waiting)}  # the first of each communicator's queue
        able = [one for one in self.waiting if heads[one.communicator] is one and one.communicator not in self.running]
        now = list[tuple[Begun, int]]()
        for one in pick(able)[: places - len(self.running)]:
            self.waiting.remove(one)
            number = self.started[one.communicator]
            self.started[one.communicator] += 1
            self.running[one.communicator] = number
            now.append((one, number))
        return now

    @property
    def is_over(self) -> bool:
        return self.place == len(self.order) and not self.waiting and not self.running


def stuck(orders: Sequence[Order], places: int, reverse: Sequence[int] = ()) -> str | None:
    """Why ranks with so many places on each device never come to an end, or None where they do.

    A device starts collectives in the order in which they were begun; those of the ranks in `reverse` take, where
    streams leave the choice, the last one first.
    """
    devices = [_Device(order) for order in orders]
    there: dict[tuple[str, int], dict[int, Begun]] = defaultdict(dict)
    moved = True
    while moved:
        moved = False
        for rank, device in enumerate(devices):
            now = device.advance(places, lambda able, rank=rank: able[::-1] if rank in reverse else able)
            moved |= bool(now)
            for one, number in now:
                there[one.communicator, number][rank] = one
        for (communicator, number), came in list(there.items()):
            one = next(iter(came.values()))
            if {(other.operation, other.size) for other in came.values()} != {(one.operation, one.size)}:
                return f"collective {number} of {communicator} is another one on every rank: {_named(came)}"
            if came.keys() == set(one.members):
                del there[communicator, number]
                moved = True
                for rank in came:
                    del devices[rank].running[communicator]
    if all(device.is_over for device in devices):
        return None
    return "; ".join(
        f"rank {rank} waits in {', '.join(device.running)}" for rank, device in enumerate(devices) if device.running
    )


def _named(came: Mapping[int, Begun]) -> str:
    return ", ".join(f"{one.operation} of {one.size} bytes by rank {rank}" for rank, one in came.items())


def mixed(orders: Sequence[Order], rank: int) -> list[Order]:
    """The same orders, but that `rank` begins two neighbours of different communicators the other way round, in as many
    places as there are.
    """
    order = list(orders[rank])
    place = 0
    while place + 1 < len(order):
        first, second = order[place], order[place + 1]
        if first is not None and second is not None and first.communicator != second.communicator:
            order[place : place + 2] = [second, first]
            place += 1
        place += 1
    return [order if number == rank else other for number, other in enumerate(orders)]


RANKS, PER_NODE = 4, 2


def kinds(workshop: Workshop) -> dict[str, tuple[str, ...]]:
    """Name -> the settings of a run on four ranks of two nodes."""
    folder = workshop.folder
    policy = json.loads(workshop.policy.read_text())
    policy["zero_optimization"] |= {"overlap_comm": True, "stage3_param_persistence_threshold": 300}
    (divided := folder / "divided.json").write_text(json.dumps(policy))
    policy["zero_optimization"]["reduce_bucket_size"] = 1000
    (small := folder / "small.json").write_text(json.dumps(policy))
    pairs, labels = (
        f'data.train=[{{"path": "{make(folder / f"{make.__name__}.jsonl", 24)}"}}]'
        for make in (make_pairs, make_labelled)
    )
    apart = f"sharding.deepspeed={divided}"
    shapes = {
        "": (apart,),
        "DPO": ("objective.name=dpo", "data.format=preference", pairs, apart),
        "KTO": ("objective.name=kto", "data.format=labelled", labels, apart),
        "distillation": ("objective.name=distil", f"objective.teacher={make_base(folder / 'teacher')}", apart),
        "experts with LoRA": (
            f"model.base={make_base(folder / 'mixtral', 'mixtral')}",
            "tuning.experts=true",
            "tuning.experts_rank=3",
            apart,
        ),
        "shared rows": ("sharding.sequence_parallel=2", apart),
        "small buckets": (f"sharding.deepspeed={small}",),
        "recomputed": ("train.activation_checkpointing=all", apart),
    }
    found = dict[str, tuple[str, ...]]()
    for scope in ("world", "node"):
        found[f"{scope}, whole adapters"] = (f"sharding.scope={scope}",)
        for name, settings in shapes.items():
            found[f"{scope}, divided adapters{name and ', '}{name}"] = (*settings, f"sharding.scope={scope}")
    return found


class Verdict(NamedTuple):
    """The collectives of a step of a rank, its communicators, and how it ends on devices of one place, with streams in
    other orders, and with two neighbours of rank 1 begun the other way round; None is well. A step may have no two
    neighbours of different communicators."""

    begun: int
    communicators: int
    in_order: str | None
    reversed: str | None
    has_neighbours: bool
    mixed: str | None

    @property
    def is_well(self) -> bool:
        return not self.in_order and not self.reversed and (self.mixed is not None) == self.has_neighbours


def verdicts(folder: Path, words: Sequence[str] = ()) -> dict[str, Verdict]:
    """Of each kind whose name has one of the words, by a second step on four ranks."""
    workshop, runs, names = Workshop(folder), list[list[str]](), list[str]()
    for name, settings in kinds(workshop).items():
        if words and not any(word in name for word in words):
            continue
        more = ("train.steps=3", "checkpoint.every_steps=0", "train.global_batch=8")
        config = workshop.config(f"order-{len(names)}", *more, *settings)
        runs.append([dump_config(config), workshop.prepare(config).train])
        if config.objective.name == "distil":
            launch(1, teaching.teach, runs[-1][0])
        names.append(name)
    ranks = launch(RANKS, recorded, runs, ranks_per_node=PER_NODE, timeout=1500)
    return {name: _verdict(orders_of([rank[number] for rank in ranks])) for number, name in enumerate(names)}


def _verdict(orders: list[Order]) -> Verdict:
    communicators = {one.communicator for one in orders[1] if one is not None}
    every = {one.communicator for order in orders for one in order if one is not None}
    begun, control = sum(one is not None for one in orders[1]), mixed(orders, 1)
    in_order, backwards = stuck(orders, 1), stuck(orders, len(every), reverse=[1, 2])
    return Verdict(begun, len(communicators), in_order, backwards, control != orders, stuck(control, 1))


def main(words: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="capstan-order-") as folder:
        found = verdicts(Path(folder), words)
    print(
        "| step | collectives | communicators of a rank | in its order | streams in others | two begun the other way"
        " round |"
    )
    print("|---|---|---|---|---|---|")
    for name, one in found.items():
        ends = [verdict or "ends" for verdict in (one.in_order, one.reversed)]
        control = (one.mixed or "ends") if one.has_neighbours else "there are no two"
        print(f"| {name} | {one.begun} | {one.communicators} | {' | '.join(ends)} | {control} |")
    return int(not all(one.is_well for one in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
