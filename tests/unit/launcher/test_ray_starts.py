"""Several starts of ranks in the same workers of Ray, without a Ray: threads are the workers, and the actor's methods run
in a loop of their own.
"""

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from launcher.cluster.ray import group, train
from launcher.cluster.ray import worker as program
from launcher.cluster.ray.cluster import Need
from launcher.cluster.ray.starts import Starts, StartsOfWorkers, each_start
from launcher.policy import retry
from launcher.policy.retry import Failure, RankDied
from launcher.start.keeper import Unprepared
from launcher.start.local_ranks import GivenUp, end_together
from trainer.config import parse_config
from trainer.errors import MachineLeaves, SlowMachine, StorageError
from trainer.processes.helper_thread import in_thread
from trainer.run import layout
from trainer.run.folder import run_folder

PATIENCE = 60.0
KILLED = RankDied("its process was killed by signal 9", at=1.0, killed=True)


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The actor, as handles of Ray show it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    real = StartsOfWorkers()

    class Handle:
        def __getattr__(self, name: str) -> Any:
            method = getattr(real, name)
            return SimpleNamespace(remote=lambda *given: asyncio.run_coroutine_threadsafe(method(*given), loop))

    monkeypatch.setattr(ray, "get", lambda future, timeout=None: future.result(timeout or PATIENCE))
    monkeypatch.setattr(ray, "wait", lambda futures, timeout: ([one for one in futures if one.done()], []))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the workers write there does not outlive the test
    ports = iter(range(4711, 5000))
    monkeypatch.setattr(group, "meeting", lambda: ("n0", next(ports)))
    yield Handle()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


class Worker:
    """A worker whose rank ends when it is told to, or when it is given up."""

    def __init__(self, actor: Any, rank: int) -> None:
        self.tasks = list[dict[str, Any]]()
        self._end = Future[Exception | None]()
        self.over = in_thread(lambda: each_start(actor, rank, {"began": 1}, self._be_rank), f"rank {rank}")

    def end(self, error: Exception | None = None) -> None:
        self._end.set_result(error)

    def _be_rank(self, task: Any, given_up: Callable[[], bool]) -> Exception | None:
        self.tasks.append({**task, "place": os.environ["MASTER_PORT"]})
        while not self._end.done():
            if given_up():
                return GivenUp("another rank has died")
            threading.Event().wait(0.01)
        ended, self._end = self._end.result(), Future()
        if isinstance(ended, AssertionError):
            raise ended
        return ended


def waited_for(starts: Starts) -> Failure | None:
    end_together(starts.ranks(), starts.look, kept=True)
    return retry.first_cause(starts.errors().items())


def test_workers_start_their_ranks_again_until_the_driver_closes(actor: Any) -> None:
    workers, starts = [Worker(actor, rank) for rank in range(3)], Starts(actor, 3)
    for number in (2, 3):
        workers[1].end(KILLED)  # the other two do not notice, and are given up
        end = waited_for(starts)
        assert end is not None
        assert (end.died, end.died_at) == (1, 1.0)
        assert starts.all_told()
        starts.begin({"began": number})
    for worker in workers:
        worker.end()
    assert waited_for(starts) is None
    starts.close()
    for worker in workers:
        worker.over.result(PATIENCE)
        assert [task["began"] for task in worker.tasks] == [1, 2, 3]
    places = [{task["place"] for task in tasks} for tasks in zip(*(worker.tasks for worker in workers), strict=True)]
    assert [len(place) for place in places] == [1, 1, 1], "the ranks of a start meet at one place"
    assert len(set[str].union(*places)) == 3


def test_a_rank_of_an_earlier_start_or_one_that_was_given_up_explains_no_end_of_this_one(actor: Any) -> None:
    ray.get(actor.begin.remote({}))
    ray.get(actor.tell_end.remote(1, 0, KILLED))
    ray.get(actor.tell_end.remote(2, 1, None))
    assert ray.get(actor.ends.remote(2, 0)) == [(1, None)]
    assert ray.get(actor.ends.remote(1, 0)) == [], "nobody takes this end for one of the start before"
    starts = Starts(actor, 3)
    starts._ended = {0: GivenUp(), 1: KILLED, 2: None}
    assert starts.errors() == {1: KILLED}
    starts._ended = {0: RankDied("its process ended with exit code 3"), 1: KILLED, 2: None}
    assert [starts.code(rank) for rank in range(4)] == [1, -9, 0, None], "only what was killed has the code of that"
    starts.fit.set_result(None)
    assert starts.code(3) == 1, "it has ended with the group"


def test_ranks_that_are_left_end_with_the_group(actor: Any) -> None:
    """A driver that closes ends those that train, and the workers raise what ended their ranks."""
    first, second = Worker(actor, 0), Worker(actor, 1)
    first.end(StorageError("503"))
    Starts(actor, 2).close()
    with pytest.raises(StorageError, match="503"):
        first.over.result(PATIENCE)
    with pytest.raises(GivenUp):
        second.over.result(PATIENCE)


def test_a_worker_that_is_gone_ends_the_group(actor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells nothing, and Ray notices it late. The others' errors are known."""
    monkeypatch.setattr("launcher.cluster.ray.starts._ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("launcher.start.local_ranks._LAST_WORDS_SECONDS", 0.2)
    there, starts = Worker(actor, 0), Starts(actor, 2)
    starts.fit = there.over
    there.end(RuntimeError("connection closed by peer"))
    end = waited_for(starts)
    assert end is not None
    assert end.reason == "rank 0 failed: RuntimeError: connection closed by peer"
    assert not starts.all_told()
    assert there.over.done()


def test_what_is_raised_in_a_worker_is_its_own_end(actor: Any) -> None:
    worker = Worker(actor, 0)
    worker.end(AssertionError("this worker is of no use"))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="no use"):
        worker.over.result(PATIENCE)


CONFIG = "{run: {name: big, store: /s}, model: {base: /m}, data: {train: [{path: d}]}, train: {steps: 20}}"
SLOW = retry.classify({0: SlowMachine("n/slow takes twice as long", [1], ["n/slow"])})
LEAVES = MachineLeaves("stopped at step 3 because a machine is taken away")


@pytest.mark.parametrize(
    ("end", "nodes", "told", "again"),
    [
        (retry.classify({1: KILLED}), ["a", "b"], True, True),
        (retry.classify({1: StorageError("503")}), ["a", "b"], True, True),
        (retry.classify({1: KILLED}), ["a", "lost"], True, False),
        (retry.classify({1: KILLED}), ["a", "slow"], True, False),
        (retry.classify({1: KILLED}), ["a", "b"], False, False),
        (retry.classify({0: LEAVES}), ["a", "b"], True, False),
        (retry.classify({0: LEAVES}, resizing=True), ["a", "b"], True, False),
        (retry.lost_machine("c"), ["a", "b"], True, False),
    ],
    ids=["killed", "store", "lost", "slow", "silent", "leaves", "resize", "lost before"],
)
def test_the_same_workers_go_on_unless_machines_or_their_number_change(
    monkeypatch: pytest.MonkeyPatch, end: Failure, nodes: list[str], told: bool, again: bool
) -> None:
    monkeypatch.setattr(train, "alive_nodes", lambda: {"a": "n/a", "b": "n/b", "slow": "n/slow"})
    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    keepers = SimpleNamespace(nodes=SimpleNamespace(remote=lambda: nodes))
    attempts: Any = SimpleNamespace(config=parse_config(CONFIG, ["retry.slow_rank=replace"]), ends=[SLOW, end])
    starts: Any = SimpleNamespace(all_told=lambda: told, begin=lambda task: None)
    workers = train._Workers(attempts, "", lambda: None, print, keepers)
    group = train._Group(attempts, Need(2, 2, {}), 2, (), starts)
    assert workers._can_start_again(group) is again
    over = train._Group(attempts, Need(2, 2, {}), 2, (), starts)
    over.fit.set_result(None)
    assert not workers._can_start_again(over), "its workers have ended"
    group.resizing = group._asked = True
    group.start_again({})
    assert (group.resizing, group._asked) == (False, False), "these ranks may be asked to make room, too"


@pytest.mark.parametrize(
    ("at", "answers", "confirmed"), [(None, False, False), (None, True, True), (1.0, False, True)], ids=str
)
def test_a_rank_that_went_with_its_machine_may_not_have_been_the_first(
    at: float | None, answers: bool, confirmed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    died, asked, ends = RankDied("it cannot be reached", at=at), list[int](), list[Any]()

    def keeper_here(keepers: Any, rank: int) -> str:
        asked.append(rank)
        if len(asked) > 1 and not answers:
            raise Unprepared("no keeper answers")
        return "a keeper"

    def forked_rank(*_: Any, **__: Any) -> None:
        raise died

    def each_start(starts: Any, rank: int, task: Any, be_rank: Callable[..., Any]) -> None:
        try:
            ends.append(be_rank({}, lambda: False))
        except RankDied as error:
            ends.append(error)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0123456789"))
    for name, value in (("keeper_here", keeper_here), ("forked_rank", forked_rank), ("each_start", each_start)):
        monkeypatch.setattr(program, name, value)
    monkeypatch.setattr(program, "_gauges", lambda run: None)
    text = "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {steps: 1}\n"
    program.rank_of_worker({"config": text, "joined": True, "keepers": "of this machine", "starts": None})
    (end,) = ends
    assert (end.confirmed, end is died) == (confirmed, confirmed)


@pytest.mark.parametrize(
    ("rank", "joined", "leaves"), [("0", True, True), ("0", False, False), ("1", True, False)], ids=str
)
def test_a_worker_without_keepers_is_the_rank_and_the_first_one_alone_hears_of_machines_that_leave(
    rank: str, joined: bool, leaves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = list[Any]()

    def imported_rank(gpus: int | None) -> Callable[..., None]:
        return lambda config, datasets, *, resume, starter: ran.append((config, datasets, resume, starter))

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0123456789"))
    monkeypatch.setattr(program, "imported_rank", imported_rank)
    monkeypatch.setattr(program, "_drain_notice", lambda: lambda: True)
    monkeypatch.setattr(program, "_gauges", lambda run: f"those of {run}")
    text = f"run: {{name: a, store: {tmp_path}}}\nmodel: {{base: b}}\ndata: {{train: [{{path: c}}]}}\ntrain: {{steps: 1}}\n"
    task = {"facts": {"ray": "2"}, "began": 5.0, "datasets": {"train": "d", "eval": None}, "resume": True}
    program.rank_of_worker({"config": text, "joined": joined, "keepers": None, "starts": None, **task})
    ((config, datasets, resume, starter),) = ran
    assert (datasets.train, resume, starter.facts, starter.began) == ("d", True, {"ray": "2"}, 5.0)
    assert (starter.machine, starter.observe) == (f"{socket.gethostname()}/01234567", "those of a")
    assert starter.preempted() is leaves
    assert run_folder(config).exists(layout.RANKS_BEGUN) is (rank == "0")


def test_the_steps_of_a_run_are_in_rays_metrics_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = dict[str, Any]()

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.values, self.tags = list[float](), dict[str, str]()
            made[name] = self

        def set_default_tags(self, tags: dict[str, str]) -> None:
            self.tags = tags

        def set(self, value: float) -> None:
            self.values.append(value)

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    observe = program._gauges("mine")
    for step in (1, 2):
        observe({"step": step, "loss": 2.5, "tokens_per_second": 900.0, "restarts": 1, "lr": 0.1})
    assert {name: gauge.values for name, gauge in made.items()} == {
        "capstan_step": [1, 2],
        "capstan_loss": [2.5, 2.5],
        "capstan_tokens_per_second": [900.0, 900.0],
        "capstan_restarts": [1, 1],
    }
    assert {gauge.tags["run"] for gauge in made.values()} == {"mine"}
