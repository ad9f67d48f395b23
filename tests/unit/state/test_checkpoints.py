"""A run's checkpoints as its only rank writes them and goes on from them. Ranks that agree: tests/dist/test_checkpoint.py,
tests/dist/test_save_rules.py.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config.run import Checkpoint
from trainer.errors import ConfigError, NothingToResume, StorageError, Superseded
from trainer.run import layout
from trainer.state.checkpoint import retention
from trainer.state.checkpoint.checkpoints import Checkpoints, CommitHooks, TrainablePartition
from trainer.state.checkpoint.identity import Identity
from trainer.state.checkpoint.manifest import committed_steps, read_doubt, read_manifest
from trainer.store.store import Store, open_store

SHAPE = (4, 5)
ALONE: Any = SimpleNamespace(
    rank=0,
    world_size=1,
    device=torch.device("cpu"),
    gather_objects=lambda mine: [mine],
    on_first=lambda action: action(),
    together=lambda action: [action()],
)


class Learner:
    """Each value of what learns is the step. The optimizer counts others."""

    def __init__(self, step: int = 0, decay: float = 0.1, shape: tuple[int, ...] = SHAPE) -> None:
        self.updates, self.shape = 10 * step, shape
        self.groups = {"lora_A": {"weight_decay": decay}}
        numel = torch.Size(shape).numel()
        self.states = {name: torch.full((numel,), float(step)) for name in ("master", "exp_avg", "exp_avg_sq")}

    def partitions(self) -> list[TrainablePartition]:
        return [TrainablePartition("weight", self.shape, 0, len(self.states["master"]), self.states)]

    def refresh(self, updates: int) -> None:
        self.updates = updates

    @property
    def values(self) -> set[float]:
        return {value for state in self.states.values() for value in state.tolist()}


class Memory:
    """A memory that outlives the rank, with what was kept there."""

    source = "memory"

    def __init__(self) -> None:
        self.kept = dict[int, tuple[dict[str, Any], Tensor]]()
        self.gone_on_from = list[int | None]()

    def keep(self, step: int, facts: dict[str, Any], size: int, copy: Callable[[Tensor], object]) -> None:
        room = torch.zeros(size, dtype=torch.uint8)
        copy(room)
        self.kept[step] = facts, room

    def found(self) -> dict[int, tuple[dict[str, Any], Tensor]]:
        return self.kept

    def go_on_from(self, step: int | None) -> None:
        self.gone_on_from.append(step)

    def arrived(self) -> None:
        """At once."""

    def is_sound(self, step: int) -> bool:
        return True

    def sent_again(self) -> int:
        return 0


class InTurn(ThreadPoolExecutor):
    """Done when it is submitted."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        fn(*args, **kwargs)


@dataclass
class Run:
    """A run in a folder, and everything that was said of it."""

    folder: Store
    rules: Checkpoint = field(default_factory=lambda: Checkpoint(keep_last=9))
    base: dict[str, Any] = field(default_factory=lambda: {"path": "/models/b"})
    memory: Memory | None = None
    told: list[tuple[Any, ...]] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)

    def start(self, generation: int = 1) -> Checkpoints:
        def record(kind: str, **values: Any) -> None:
            self.told.append((kind, values["reason"] if "reason" in values else values["step"]))

        def calls(name: str) -> Callable[[], None]:
            return lambda: self.told.append((name, self.steps))

        hooks = CommitHooks(
            record, calls("before"), calls("after"), lambda step: self.told.append(("oldest", step, self.steps))
        )
        identity = Identity("data", self.base, {"rank": 4})
        made = Checkpoints(
            self.folder, ALONE, generation, identity, self.rules, hooks, evaluated="rows", memory=self.memory
        )
        made._pruning = InTurn()
        return made

    def save(self, checkpoints: Checkpoints, *steps: int, loss: float | None = None) -> None:
        for step in steps:
            checkpoints.save(Learner(step), step, {"bin": step}, eval_loss=loss)
            checkpoints.finish()

    def restored(self, generation: int = 2, learner: Learner | None = None) -> tuple[int | None, Learner]:
        learner = learner or Learner()
        found = self.start(generation).restore(learner, required=False, log=self.logged.append)
        return found and found.step, learner

    @property
    def steps(self) -> list[int]:
        return committed_steps(self.folder)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(open_store(str(tmp_path)))


def test_a_commit_is_preceded_and_followed_by_those_who_wait_for_it(run: Run) -> None:
    run.rules = Checkpoint(keep_last=2)
    run.save(run.start(), 1, 2, 3)
    assert run.told == [
        *(("before", []), ("commit", 1), ("after", [1])),
        *(("before", [1]), ("commit", 2), ("after", [2, 1])),
        *(("before", [2, 1]), ("commit", 3), ("after", [3, 2, 1]), ("oldest", 2, [3, 2])),
    ]


def test_old_checkpoints_go_after_each_commit_beside_the_training(run: Run) -> None:
    run.rules = Checkpoint(keep_last=1)
    checkpoints = run.start()
    checkpoints._pruning = ThreadPoolExecutor(1)
    for step in (1, 2, 3, 4):
        run.save(checkpoints, step)
        assert checkpoints._next_pruning is not None
        checkpoints._next_pruning.result(60)
        assert run.steps == [step]


def test_each_save_has_a_name_of_its_own_and_its_loss_names_the_data(run: Run) -> None:
    checkpoints = run.start(generation=3)
    run.save(checkpoints, 1)
    run.save(checkpoints, 2, loss=0.5)
    first, second = (read_manifest(run.folder, step) for step in (1, 2))
    assert [one.shards[0].key for one in (first, second)] == [
        "checkpoints/step-000000001/000003-000001/shard-00000.safetensors",
        "checkpoints/step-000000002/000003-000002/shard-00000.safetensors",
    ]
    assert [(one.eval_loss, one.eval_data) for one in (first, second)] == [(None, None), (0.5, "rows")]
    assert (second.generation, second.position, second.updates) == (3, {"bin": 2}, 20)


def test_a_save_that_comes_before_the_last_one_is_done_is_counted(run: Run) -> None:
    run.rules = Checkpoint(when_busy="skip")
    checkpoints = run.start()
    may_end, counted = Event(), list[Any]()
    commits = list[dict[str, Any]]()

    def record(kind: str, **values: Any) -> None:
        counted.append(values.get("skipped", kind))
        commits.extend([values] if kind == "commit" else [])

    checkpoints.hooks = CommitHooks(record)
    checkpoints._uploads.submit(may_end.wait, 10)  # the store is slow
    for step in (1, 2, 3):
        checkpoints.save(Learner(step), step, {"bin": step})
        checkpoints.advance(all_ready=False)  # it waits for no upload
    assert (counted, run.steps) == ([1, 2], [])
    may_end.set()
    checkpoints.save(Learner(4), 4, {"bin": 4}, may_skip=False)
    checkpoints.finish()
    assert (counted, run.steps) == ([1, 2, "commit", "commit"], [4, 1])
    sizes = [sum(one.size for one in run.folder.list(layout.checkpoint(step)) if "shard" in one.key) for step in (1, 4)]
    assert [one["bytes"] for one in commits] == sizes
    assert all(0 <= one["stall_seconds"] <= one["seconds"] + 0.01 for one in commits)


def test_a_start_commits_nothing_once_a_later_one_has_the_run(run: Run) -> None:
    run.rules = Checkpoint(failed_saves=9)
    checkpoints = run.start(generation=2)
    for generation in (1, 2):
        run.folder.put(layout.metrics(generation), b"")
    run.save(checkpoints, 1)
    run.folder.put(layout.metrics(3), b"")
    checkpoints.save(Learner(2), 2, {"bin": 2})
    with pytest.raises(Superseded, match="generation 3 of this run has started; generation 2 must not commit"):
        checkpoints.save(Learner(3), 3, {"bin": 3})
    assert run.steps == [1]


def test_so_many_saves_may_fail_in_a_row_but_not_the_last_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write, failing = Store.put_chunks, (1, 3, 5, 6)

    def fails(store: Store, key: str, chunks: Any, size: int) -> None:
        if any(key.startswith(layout.checkpoint(step)) for step in failing):
            raise StorageError("the bucket is gone")
        if key.startswith(layout.checkpoint(8)):
            raise RuntimeError("a mistake")
        write(store, key, chunks, size)

    monkeypatch.setattr(Store, "put_chunks", fails)
    run.rules = Checkpoint(failed_saves=1)
    checkpoints = run.start()
    for step in range(1, 7):
        checkpoints.save(Learner(step), step, {"bin": step})
    with pytest.raises(StorageError, match="rank 0 could not save the checkpoint of step 6: the bucket is gone"):
        checkpoints.save(Learner(7), 7, {"bin": 7})
    told = [(kind, step) for kind, step, *_ in run.told if kind == "commit"]
    assert told == [("commit", 2), ("commit", 4)]
    assert [kind for kind, *_ in run.told if kind != "before"] == [
        *("save_failed", "commit", "after") * 2,
        *("save_failed", "save_failed"),
    ]
    again = run.start(generation=2)
    again.save(Learner(8), 8, {"bin": 8})
    with pytest.raises(StorageError, match="rank 0 could not save the checkpoint of step 8: RuntimeError: a mistake"):
        again.finish()
    again.save(Learner(7), 7, {"bin": 7})
    again.finish()


def test_what_a_doubt_is_about_is_passed_over_and_written_again(run: Run) -> None:
    run.memory = Memory()
    checkpoints = run.start()
    run.save(checkpoints, 1, 2, 3)
    checkpoints.save(Learner(4), 4, {"bin": 4})  # and is not committed yet
    checkpoints.doubt(2, "a wrong byte")
    checkpoints.finish()
    doubts = {step: read_doubt(run.folder, read_manifest(run.folder, step)) for step in run.steps}
    assert doubts == {4: "a wrong byte", 3: "a wrong byte", 2: None, 1: None}
    assert run.memory.gone_on_from == [2]
    step, learner = run.restored()
    assert (step, learner.values, learner.updates) == (2, {2.0}, 20)
    assert run.logged == [
        f"checkpoint of step {step} passed over, because it is in doubt: a wrong byte" for step in (4, 3)
    ]
    assert run.memory.gone_on_from == [2, None]
    assert run.folder.exists(layout.damaged_manifest(4, 2)), "whoever looks for the wrong byte finds it"
    run.save(run.start(generation=3), 3)
    assert run.steps == [3, 2, 1]


def test_where_all_are_in_doubt_the_newest_is_better_than_none(run: Run) -> None:
    checkpoints = run.start()
    run.save(checkpoints, 1, 2)
    checkpoints.doubt(0, "a wrong byte")
    assert run.restored()[0] == 2
    assert run.logged[-1] == "there is no checkpoint without doubt, so that of step 2 is looked at"
    run.folder.put(read_manifest(run.folder, 2).shards[0].key, b"something else")
    step, learner = run.restored(generation=3)
    assert (step, learner.values) == (1, {1.0}), "the newest is damaged, too"


@pytest.mark.parametrize(("kept", "step"), [((1, 2), 2), ((2, 3), 3), ((3, 4), 4)])
def test_the_state_in_memory_counts_where_it_is_newer_than_the_newest_checkpoint(
    run: Run, kept: tuple[int, ...], step: int
) -> None:
    checkpoints = run.start()
    run.save(checkpoints, 1, 2)
    run.memory = Memory()
    checkpoints.memory = run.memory
    for one in kept:
        checkpoints.keep(Learner(one), one, {"bin": 10 * one})
    checkpoints.save(Learner(9), 9, {"bin": 9})
    checkpoints.finish()
    checkpoints.doubt(8, "a wrong byte")
    restart = run.start(generation=2)
    learner = Learner()
    found = restart.restore(learner, required=True, log=run.logged.append)
    assert found is not None
    assert (found.step, learner.values, learner.updates) == (step, {float(step)}, 10 * step)
    assert found.updates == learner.updates
    in_memory = step > 2
    assert found.position == {"bin": 10 * step if in_memory else step}
    assert (f"goes on from step {step}, which is in memory" in run.logged) is in_memory
    assert run.memory.gone_on_from[-1] == (step if in_memory else None)
    assert run.steps == [2, 1]  # that of step 9 comes again


def test_all_ranks_go_on_from_the_last_update_that_each_of_them_finds(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.memory = Memory()
    checkpoints = run.start()
    for one in (4, 5):
        checkpoints.keep(Learner(one), one, {"bin": one})
    monkeypatch.setattr(ALONE, "gather_objects", lambda mine: [mine, [3, 4]])  # another rank was killed before
    assert run.restored()[0] == 4
    monkeypatch.setattr(ALONE, "gather_objects", lambda mine: [mine, [3, 6]])
    assert run.restored()[0] is None


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(run: Run) -> None:
    assert run.restored()[0] is None
    with pytest.raises(NothingToResume):
        run.start().restore(Learner(), required=True, log=print)
    run.save(run.start(), 1)
    run.folder.put(read_manifest(run.folder, 1).shards[0].key, b"something else")
    with pytest.raises(StorageError, match="no checkpoint of .* is whole"):
        run.restored()
    with pytest.raises(StorageError, match="no checkpoint of .* is whole"):
        run.restored(learner=Learner(shape=(2, 5)))


def test_what_differs_from_the_start_before_is_said(run: Run) -> None:
    run.base = {"path": "s3://bucket/b", "versions": {"a": "1"}}
    run.save(run.start(), 1)
    assert run.restored()[0] == 1
    assert run.logged == []
    run.base = {"path": "s3://bucket/b", "versions": {"a": "2"}}
    assert run.restored(3, Learner(decay=0.2))[0] == 1
    written, changed = run.logged
    assert written.startswith("the files of s3://bucket/b have been written again since step 1")
    assert changed == ("optimizer group lora_A: weight_decay is 0.2 from now on; the checkpoint was saved with 0.1")
    more = Learner(decay=0.2)
    more.groups = {"lora_A": {"weight_decay": 0.2, "eps": 1e-8}, "embedding": {"weight_decay": 0.0}}
    run.restored(4, more)
    assert [line.partition(": ")[2] for line in run.logged[-2:]] == [
        "eps is 1e-08 from now on; the checkpoint was saved with None",
        "weight_decay is 0.0 from now on; the checkpoint was saved with None",
    ]
    run.base = {"path": "s3://bucket/b", "quantized": "nf4"}
    with pytest.raises(ConfigError, match="has base quantized: None, the configuration gives .nf4.\\. Set it back"):
        run.restored(4)
    run.base = {"path": "s3://bucket/b", "versions": {"a": "2"}}
    with pytest.raises(StorageError):
        run.restored(4, Learner(shape=(2, 5)))
    assert run.logged[-1] == (
        "checkpoint skipped: the manifest of step 1 names other parameters or shapes than its adapter has."
    )


def test_a_checkpoint_that_was_read_once_is_not_read_after_each_commit(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[int]()
    look = retention.shard_problem

    def counted(folder: Store, manifest: Any, number: int) -> str | None:
        read.append(manifest.step)
        return look(folder, manifest, number)

    monkeypatch.setattr(retention, "shard_problem", counted)
    run.rules = Checkpoint(keep_last=1, keep_every=2)
    checkpoints = run.start()
    run.save(checkpoints, 1, 2, 3)  # 1 goes, for which 2 is read
    assert (read, run.steps) == ([2], [3, 2])
    run.save(checkpoints, 4, 5, 6)
    assert (read, run.steps) == ([2], [6, 4, 2])
    resumed = run.start(generation=2)
    resumed.restore(Learner(), required=True, log=print)
    run.save(resumed, 7, 8)
    assert (read, run.steps) == ([2], [8, 6, 4, 2])
    proving = run.start(generation=3)
    proving.save(Learner(10), 10, {"bin": 10})
    proving.prove()
    run.save(proving, 11, 12)
    assert (read, run.steps) == ([2], [12, 10, 8, 6, 4, 2])


def test_a_commit_that_the_store_did_not_keep_lets_the_one_before_stay_and_is_said(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.rules = Checkpoint(keep_last=1)
    checkpoints = run.start()
    run.save(checkpoints, 1)
    write = Store.put_chunks

    def wrongly(store: Store, key: str, chunks: Any, size: int) -> None:
        content = b"".join(map(bytes, chunks))
        write(store, key, [content[:-1] + bytes([content[-1] ^ 1])] if "shard" in key else [content], size)

    monkeypatch.setattr(Store, "put_chunks", wrongly)
    run.save(checkpoints, 2)
    kind, reason = run.told[-1]
    assert kind == "prune_failed"
    assert reason.startswith("the checkpoint of step 2 is damaged: ")
    assert reason.endswith(" Step 1 stays.")
    assert run.steps == [2, 1]
    checkpoints.save(Learner(3), 3, {"bin": 3})
    with pytest.raises(StorageError, match="does not keep what is written to it"):
        checkpoints.prove()
