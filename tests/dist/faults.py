"""Ranks that save, restore and export while their store fails, stalls or kills them."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.dist.assembled import STATES
from tests.dist.runs import outcome_of
from tests.faulty import Fault, FaultyStore
from trainer.config import Checkpoint
from trainer.errors import StorageError
from trainer.processes.ranks import Team, join
from trainer.run import layout
from trainer.state.checkpoint.checkpoints import Checkpoints, CommitHooks, TrainablePartition
from trainer.state.checkpoint.identity import Identity
from trainer.state.checkpoint.learnt_weights import master_weights
from trainer.state.checkpoint.manifest import committed_steps, problems_of, read_manifest, whole_checkpoint
from trainer.state.checkpoint.retention import plan_removal, remove
from trainer.store.store import Store, open_store

SHAPES = {
    "model.layers.0.self_attn.q_proj.lora_A.default.weight": (3, 7),
    "model.layers.0.self_attn.q_proj.lora_B.default.weight": (5, 3),
}
RULES = Checkpoint(keep_last=1, failed_saves=100)


@dataclass
class FakeLearner:
    """In the engine's place: states that tell their parameter, their kind and the step that they are of."""

    ranks: Team
    step: int = 0
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def partitions(self) -> list[TrainablePartition]:
        return [
            TrainablePartition(name, shape, *self._interval(shape), self.states.get(name) or self._states(name, shape))
            for name, shape in SHAPES.items()
        ]

    def _interval(self, shape: tuple[int, ...]) -> tuple[int, int]:
        numel = torch.Size(shape).numel()
        size = -(-numel // self.ranks.world_size)
        return min(numel, self.ranks.rank * size), min(numel, (self.ranks.rank + 1) * size)

    def _states(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        begin, end = self._interval(shape)
        self.states[name] = {state: whole_state(name, state, self.step)[begin:end].clone() for state in STATES}
        return self.states[name]

    @property
    def updates(self) -> int:
        return self.step

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        return {"lora_A": {"lr_ratio": 1.0}}

    def refresh(self, updates: int) -> None:
        self.step = updates


def whole_state(name: str, state: str, step: int) -> Tensor:
    """(numel,) fp32."""
    first = 10_000 * step + 1000 * STATES.index(state) + 100 * list(SHAPES).index(name)
    return torch.arange(first, first + torch.Size(SHAPES[name]).numel(), dtype=torch.float32)


def checkpoints(run: Store, ranks: Team, generation: int = 1) -> tuple[Checkpoints, list[dict[str, Any]]]:
    """And what it records."""
    events: list[dict[str, Any]] = []

    def record(kind: str, **values: Any) -> None:
        events.append({"kind": kind, **values})

    return Checkpoints(run, ranks, generation, Identity("data", {}, {}), RULES, CommitHooks(record)), events


def save(run: Store, ranks: Team, step: int, generation: int = 1) -> list[dict[str, Any]]:
    """Save and prove the state of `step`; the removal of what retention drops comes in between, in a fixed order."""
    ours, events = checkpoints(run, ranks, generation)
    ours._pruning = InTurn()
    learner = FakeLearner(ranks, step)
    ours.save(learner, step, {"bin": step})
    ours.prove()
    return events


class InTurn(ThreadPoolExecutor):
    """Done when it is submitted."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        fn(*args, **kwargs)


def wrong_with(run: Store, at_least: int) -> list[str]:
    """Nothing, if each commit is whole, holds the values of its step, and the newest is not older than `at_least`."""
    found = [problem for step in committed_steps(run) for problem in problems_of(run, read_manifest(run, step))]
    newest = whole_checkpoint(run)
    for name, values in master_weights(run, newest).items():
        if not torch.equal(values.view(-1), whole_state(name, "master", newest.step)):
            found.append(f"{name} of step {newest.step} has other values")
    return found if newest.step >= at_least else [*found, f"step {at_least} is lost, the newest is {newest.step}"]


def left_over(run: Store) -> list[str]:
    """The keys that no commit refers to after a removal that takes orphans of any age."""

    later = time.time() + 3600
    remove(run, plan_removal(run, Checkpoint(keep_last=1), orphan_hours=0, now=lambda: later))
    keys = {entry.key for entry in run.list(layout.CHECKPOINTS)}
    for step in committed_steps(run):
        keys -= {layout.manifest(step), *(shard.key for shard in read_manifest(run, step).shards)}
    return sorted(keys)


def saves(uri: str) -> dict[str, Any]:
    """A save with the removal after it, once for each of its operations and each way to go wrong."""
    ranks, root = join(), open_store(uri)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    operations: list[str] = []
    for how, at in each_fault(operations):
        run = root.sub(f"{how}-{at}")
        save(run, ranks, 1)
        fault = Fault(at, how, stalled=lambda run=run, wrong=wrong: wrong.extend(wrong_with(run, 1)))
        outcome = outcome_of(lambda run=run, fault=fault: save(FaultyStore(run, fault), ranks, 2))
        operations[:] = operations or fault.operations
        found = wrong_with(run, 2 if outcome["outcome"] == "finished" else 1)
        save(run, ranks, 3, generation=2)  # whatever went wrong, the next start saves
        found += wrong_with(run, 3) + [f"{key} is left over" for key in left_over(run)]
        wrong += [f"{how} at {at}: {text}" for text in found]
        seen[outcome["outcome"]] += 1
    return {"operations": operations, "outcomes": seen, "wrong": wrong}


def each_fault(operations: list[str]) -> Iterator[tuple[str, int]]:
    """First none, to count the operations; then each of them, each way."""
    yield "fail", 0
    for how in ("fail", "lost", "stall"):
        for at in range(1, len(operations) + 1):
            yield how, at


def killed_save(uri: str, at: int) -> None:
    """Dies at operation `at` of the save of step 2, if it has so many."""
    ranks, run = join(), open_store(uri).sub(str(at))
    save(run, ranks, 1)
    save(FaultyStore(run, Fault(at, "kill")), ranks, 2)


def after_kills(root: str, count: int) -> list[str]:
    """The problems of the `count` runs that killed saves left, before and after another start saves."""
    ranks, wrong = join(), []
    for at in range(1, count + 1):
        run = open_store(root).sub(str(at))
        found = wrong_with(run, 1)
        save(run, ranks, 3, generation=2)
        found += wrong_with(run, 3) + [f"{key} is left over" for key in left_over(run)]
        wrong += [f"killed at {at}: {text}" for text in found]
    return wrong


def restores_with_one_faulty_rank(uri: str) -> dict[str, Any]:
    """Restore on several ranks while rank 1's store fails, once for each of its operations. The same on all ranks?"""
    ranks, root = join(), open_store(uri)
    save(root, ranks, 4)
    counting = Fault()
    _restore(root, ranks, counting)
    operations = int(ranks.gather(len(counting.operations))[1][0])
    faults = [Fault(at if ranks.rank == 1 else 0) for at in range(operations + 1)]
    return {"operations": operations, "messages": [_restore(root, ranks, fault)["message"] for fault in faults]}


def _restore(run: Store, ranks: Team, fault: Fault) -> dict[str, Any]:
    learner = FakeLearner(ranks)
    ours, _ = checkpoints(FaultyStore(run, fault), ranks, 2)
    outcome = outcome_of(lambda: ours.restore(learner, required=True, log=print))
    if outcome["outcome"] == "finished":
        for part in learner.partitions():
            for state, values in part.states.items():
                assert torch.equal(values, whole_state(part.name, state, 4)[part.begin : part.end])
    return outcome


# Rules of saving.


class Held(Store):
    """Uploads wait until they are released."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.uri, store._backend, store._prefix)
        self.released = threading.Event()

    def put_chunks(self, key: str, chunks: Any, size: int) -> None:
        assert self.released.wait(timeout=30)
        super().put_chunks(key, chunks, size)


def saves_while_one_is_under_way(uri: str, when_busy: str) -> dict[str, Any]:
    """Save step 1 and hold its upload; step 2 is due meanwhile, and step 3, which must be saved, afterwards."""
    ranks, run = join(), Held(open_store(uri))
    ours, events = checkpoints(run, ranks)
    ours.rules = Checkpoint(keep_last=9, when_busy=when_busy)  # type: ignore[arg-type]
    learner = FakeLearner(ranks, 1)
    ours.save(learner, 1, {})
    ours.advance(all_ready=ours.ready)
    held = not ours.ready and committed_steps(run) == []
    release = threading.Timer(0.2, run.released.set)
    if when_busy == "wait":
        release.start()
    ours.save(learner, 2, {})
    run.released.set()
    ours.save(learner, 3, {}, may_skip=False)
    ours.finish()
    return {"held": held, "committed": committed_steps(run), "events": events}


def saves_on_a_failing_store(uri: str, allowed: int) -> dict[str, Any]:
    """Save each step while every write fails, but for step 3; `allowed` may fail in a row."""
    ranks, run = join(), open_store(uri)
    ours, events = checkpoints(run, ranks)
    ours.rules = Checkpoint(failed_saves=allowed)
    learner = FakeLearner(ranks)
    ended = None
    for step in range(1, 10):
        # The first operation of a save is the upload.
        ours.run = run if step == 3 else FaultyStore(run, Fault(1))
        ours.save(learner, step, {})
        outcome = outcome_of(ours._settle)
        if outcome["outcome"] != "finished":
            ended = {"step": step, **outcome}
            break
    return {"ended": ended, "events": events, "committed": committed_steps(run)}


def saves_with_losses(uri: str, losses: list[float | None]) -> list[int]:
    """Save a step for each evaluation loss; which remain of the newest and the best."""
    ranks, run = join(), open_store(uri)
    ours, _ = checkpoints(run, ranks)
    ours.rules, ours._pruning = Checkpoint(keep_last=1, keep_best=1), InTurn()
    learner = FakeLearner(ranks)
    for step, loss in enumerate(losses, start=1):
        ours.save(learner, step, {}, eval_loss=loss)
        ours.finish()
    return committed_steps(run)


def a_removal_that_fails(uri: str) -> list[str]:
    """Two saves of which one goes, while nothing can be deleted."""
    ranks, run = join(), open_store(uri)

    class Keeping(Store):
        def delete(self, key: str) -> None:
            raise StorageError(f"{key} is held.")

    save(run, ranks, 1)
    return [
        f"{event['kind']} {event.get('reason', '')}".strip()
        for event in save(Keeping(run.uri, run._backend, run._prefix), ranks, 2)
    ]


def race(uri: str) -> dict[str, Any]:
    """Each rank is a run of its own: both save one step of one folder at the same time."""
    ranks, run = join(), open_store(uri)
    alone = Alone(ranks)
    ours, events = checkpoints(run, alone, generation=ranks.rank + 1)
    learner = FakeLearner(alone, 1)
    ours.save(learner, 1, {"bin": ranks.rank})
    ranks.gather(0.0)
    outcome = outcome_of(ours.finish)
    ranks.gather(0.0)
    return {**outcome, "kinds": [event["kind"] for event in events], "wrong": wrong_with(run, 1)}


class Alone(Team):
    """A rank that is the only one of its run, in a process that has others for other things."""

    def __init__(self, ranks: Team) -> None:
        super().__init__(0, 1, 1, 0, ranks.device, world=ranks.world)

    def gather(self, *values: float) -> list[list[float]]:
        return [list(values)]

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def save_through_an_outage(uri: str, marks: str, megabytes: int) -> dict[str, Any]:
    """Save while the server is killed in the middle of the upload; `marks` is the folder that both sides signal in."""
    ranks, run = join(), open_store(uri, retry_seconds=60)
    save(run, ranks, 1)
    under_way, steps = Path(marks, "under-way"), 0

    class Watched(Store):
        def put_chunks(self, key: str, chunks: Any, size: int) -> None:
            def observed() -> Iterator[Any]:
                for number, chunk in enumerate(chunks):
                    yield chunk
                    if number * len(chunk) > size // 2 and not under_way.exists():
                        under_way.touch()
                        while not Path(marks, "killed").exists():
                            _pause()

            super().put_chunks(key, observed(), size)

    ours, events = checkpoints(Watched(run.uri, run._backend, run._prefix), ranks, 2)
    learner = FakeLearner(ranks, 2)
    name = next(iter(SHAPES))
    SHAPES[name] = (megabytes, 2**18 // 3)
    ours.save(learner, 2, {"bin": 2})
    while ours._pending is not None:
        ours.advance(all_ready=ours.ready)  # as the loop does at each step's border
        steps += 1
        if Path(marks, "killed").exists():
            Path(marks, "trained-on").touch()
        _pause()
    newest = whole_checkpoint(run)
    return {"steps": steps, "events": [event["kind"] for event in events], "newest": newest.step, "bytes": newest.size}


def _pause() -> None:
    """A step's time."""
    torch.randn(200, 200).matmul(torch.randn(200, 200))
