"""The driver's attempts at a run, without a Ray: what an end is judged by, and a store that does not answer for a
while.
"""

import itertools
import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from launcher.cluster.ray import data, group, train
from launcher.cluster.ray.cluster import Need
from launcher.cluster.ray.group import RankGroup
from launcher.policy import retry
from launcher.policy.retry import Failure
from launcher.start import attempts
from launcher.start.attempts import Attempts, Watch
from launcher.view.status import read_status
from trainer.config import Config, override, parse_config
from trainer.data.compile.prepare import Datasets
from trainer.errors import (
    CapstanError,
    ConfigError,
    DataError,
    DoesNotFit,
    SlowMachine,
    Stopped,
    StorageError,
    Superseded,
    Unreachable,
)
from trainer.plan import assemble
from trainer.processes import devices
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.run.owner import newest_number, take
from trainer.run.records import generations, read_records
from trainer.run.requests import request_stop
from trainer.store.store import Store

NOTHING_STARTED = Failure("Ray could not start the ranks", None)
Attempt = Callable[[Store], Failure | None]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config(
        f"""
run: {{name: big, store: {tmp_path}}}
model: {{base: /m}}
data: {{train: [{{path: d}}]}}
train: {{steps: 20}}
cluster: {{ray: {{resize_interval: 1}}}}
retry: {{failures: 2}}
"""
    )


@pytest.fixture
def run(config: Config) -> Store:
    return run_folder(config)


def ranks_that(generation: int, *records: dict[str, Any], end: Failure | None) -> Attempt:
    """An attempt whose ranks claim `generation` and leave these records."""

    def attempt(run: Store) -> Failure | None:
        lines = [{"kind": "start", "step": 0, "total_steps": 20}, *records]
        run.put(layout.metrics(generation), "".join(json.dumps(line) + "\n" for line in lines).encode())
        return end

    return attempt


def no_ranks(run: Store) -> Failure:
    return NOTHING_STARTED


def drive(config: Config, *made: Attempt) -> list[str]:
    """Run the driver over these attempts; returns why each was followed by another."""
    log, script = list[str](), iter(made)
    owner = take(run_folder(config), "capstan train", 0)
    attempts.keep_trying(
        Attempts(config, Datasets("d", None), owner, resume=False), lambda: next(script)(owner.run), log.append
    )
    assert next(script, None) is None
    return log


def ends(run: Store, generation: int) -> list[str]:
    return [record["reason"] for record in read_records(run, generation) if record["kind"] == "end"]


def test_an_attempt_without_ranks_is_not_judged_by_the_records_of_the_one_before(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"kind": "step", "step": 7, "loss": 1.0, "tokens": 1, "seconds": 1.0}
    hang = {"kind": "end", "outcome": "failed", "reason": "rank 1 hangs in step 8", "hung_ranks": [1]}
    of_before = (layout.RESTART, layout.RANKS_BEGUN)
    for key in of_before:
        run.put(key, b"{}")
    log = drive(
        config,
        ranks_that(1, step, hang, end=Failure("rank 1 died", None)),
        no_ranks,
        ranks_that(3, end=None),
    )
    assert [reason.partition(". ")[0] for reason in log] == ["rank 1 hangs in step 8", NOTHING_STARTED.reason]
    assert (ends(run, 1), ends(run, 2), ends(run, 3)) == (["rank 1 hangs in step 8"], [NOTHING_STARTED.reason], [])
    assert not any(map(run.exists, of_before)), "these ranks have begun nothing, and nobody has asked them to restart"


def test_a_rank_that_died_is_why_a_start_ended_whatever_the_others_saw(config: Config, run: Store) -> None:
    saw = {"kind": "end", "outcome": "failed", "reason": "the connection is broken"}
    drive(config, ranks_that(1, saw, end=Failure("rank 1 died", None)), ranks_that(2, saw, end=None))
    assert (ends(run, 1), ends(run, 2)) == ([saw["reason"], "rank 1 died"], [saw["reason"]])


def test_the_end_of_a_run_whose_last_attempt_had_no_ranks_is_its_status(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CapstanError, match="failure 3.*`capstan logs big --store /.*` shows more"):
        drive(config, ranks_that(1, end=Failure("rank 1 died", None)), no_ranks, no_ranks)
    status = read_status(run)
    assert (status.state, status.reason) == ("failed", NOTHING_STARTED.reason)
    assert ends(run, 1) == ["rank 1 died"]


@pytest.mark.parametrize("error", [Stopped("stopped by alice"), ConfigError("no room")], ids=str)
def test_a_run_that_ends_between_two_attempts_is_not_one_that_restarts(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch, error: CapstanError
) -> None:
    def ends(run: Store) -> None:
        raise error

    run.create(layout.manifest(4), b"a checkpoint")
    with pytest.raises(Stopped) as caught:
        drive(config, ranks_that(1, end=Failure("rank 1 died", None)), ends)
    status = read_status(run)
    assert (status.state, status.reason) == ("stopped", str(caught.value))
    if isinstance(error, Stopped):
        assert str(caught.value) == "stopped by alice"
    else:
        again = "`capstan resume big --store "
        assert str(caught.value).startswith(f"rank 1 died; since then: no room {again}")


def down(*_: Any, **__: Any) -> Any:
    raise Unreachable("503")


@pytest.mark.parametrize("call", ["generations", "newest_records", "record_end", "committed_steps", "record_restart"])
def test_a_store_that_does_not_answer_when_an_attempt_has_ended_ends_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with monkeypatch.context() as outage:

        def store_fails(run: Store) -> Failure:
            outage.setattr(attempts, call, down)
            return Failure("503", StorageError("503"))

        def store_works(run: Store) -> None:
            outage.undo()

        made = (store_fails, store_works)
        if call == "generations":
            asked = iter((lambda run: [], down, lambda run: []))
            outage.setattr(attempts, call, lambda run: next(asked)(run))
            made = (no_ranks, store_works)
        drive(config, *made)


def test_a_store_that_never_answers_again_ends_the_run_with_its_own_exit_code(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in ("generations", "newest_records", "record_end", "committed_steps", "record_restart"):
        monkeypatch.setattr(attempts, call, down)
    with pytest.raises(StorageError, match="failure 3") as caught:
        drive(config)
    assert caught.value.exit_code == 6


def test_a_look_that_the_store_fails_is_said_once_and_made_again(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = take(run, "capstan train", 0)
    made = Attempts(config, Datasets("d", None), owner, resume=False)
    ranks = train._Group(made, Need(1, 4, {}), 2)
    watch = Watch(made, ranks.look)
    monkeypatch.setattr(attempts, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(train, "room", lambda each, without: 3)
    ranks._counted -= 100
    with monkeypatch.context() as outage:
        outage.setattr(attempts, "newest_records", down)
        watch.look()
        watch.look()
    assert capsys.readouterr().err.count("503") == 1
    ranks_that(1, end=None)(run)
    with monkeypatch.context() as outage:
        outage.setattr(train, "request_restart", down)
        watch.look()
        assert ranks.resizing
    assert not run.exists(layout.RESTART)
    ranks._counted -= 100
    watch.look()
    assert "4 ranks instead of 2" in run.get(layout.RESTART).decode()
    run.delete(layout.RESTART)
    ranks._counted -= 100
    watch.look()
    assert not run.exists(layout.RESTART), "it is asked for once"
    full = train._Group(made, Need(1, 2, {}), 2)
    monkeypatch.setattr(train, "room", lambda each, without: 9)
    full._counted -= 100
    full.look(True)
    assert (full.resizing, run.exists(layout.RESTART)) == (False, False), "it has all the ranks that it may have"


def test_a_stop_while_ranks_start_ends_them_where_nothing_can_be_lost(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_LOOK_SECONDS", 0.0)
    seen = list[bool]()
    watch = Watch(Attempts(config, Datasets("d", None), take(run, "capstan train", 0), resume=False), seen.append)
    request_stop(run, by="me")
    watch.look()  # its first ranks commit before they end
    run.put(layout.manifest(5), b"{}")
    with pytest.raises(Stopped, match=r"stopped by me while the run was starting; what was committed before stays"):
        watch.look()
    ranks_that(1, end=None)(run)
    watch.look()  # ranks that train commit once more
    assert seen == [False, True]


def test_a_run_that_was_taken_over_gets_no_end_and_no_other_attempt(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken_over(run: Store) -> Failure:
        take(run, "capstan resume", 1)
        ranks_that(2, end=None)(run)
        return Failure("rank 0 died", None)

    with pytest.raises(Superseded, match="has been taken over"):
        drive(config, ranks_that(1, end=Failure("rank 1 died", None)), taken_over)
    assert (ends(run, 1), ends(run, 2)) == (["rank 1 died"], [])


def test_ranks_are_asked_for_their_gpus_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU build of torch has no NCCL and says no more than that."""
    monkeypatch.setattr(devices, "listed_gpus", lambda: [devices.ListedGpu("GPU-1")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told = list[tuple[str, int]]()
    monkeypatch.setattr(group, "_tell", lambda *place: told.append(place))
    workers: Any = SimpleNamespace(
        execute=lambda function, *arguments: function(*arguments),
        execute_single=lambda _rank, _function: ("127.0.0.1", 4711),
    )
    ranks = RankGroup("nccl")
    monkeypatch.setattr(assemble, "torch_gpus", lambda: (0, None))
    with pytest.raises(ConfigError, match=r"has 1 GPU, but this torch is a CPU build\. Install one for CUDA"):
        ranks.backend_cls().on_start(workers, ranks)
    assert told == []
    monkeypatch.setattr(assemble, "torch_gpus", lambda: (1, "13.0"))
    ranks.backend_cls().on_start(workers, ranks)
    assert told == [("127.0.0.1", 4711)]


def test_each_worker_is_the_rank_that_its_machine_keeps_and_all_meet_where_rank_0_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = list[tuple[int, Any]]()
    keepers: Any = SimpleNamespace(number=SimpleNamespace(remote=lambda nodes: [2, 0, 1] if nodes == "nodes" else []))
    workers: Any = SimpleNamespace(
        execute=lambda function, *_: "nodes" if function is group._node else None,
        execute_single=lambda place, _: (done.append((place, "meets")), ("n2", 4711))[1],
        execute_single_async=lambda place, _, rank: done.append((place, rank)),
    )
    monkeypatch.setattr(group.ray, "get", lambda given: given)
    ranks = RankGroup("gloo", keepers=keepers)
    ranks.backend_cls().on_start(workers, ranks)
    assert done == [(1, "meets"), (0, 2), (1, 0), (2, 1)]


@pytest.mark.parametrize(("address", "family"), [("10.0.0.1", socket.AF_INET), ("fd00::1", socket.AF_INET6)])
def test_ranks_meet_at_an_address_of_either_kind_and_have_the_number_that_they_are_told(
    monkeypatch: pytest.MonkeyPatch, address: str, family: int
) -> None:
    asked = list[Any]()

    @contextmanager
    def opened(kind: int) -> Iterator[Any]:
        yield SimpleNamespace(bind=lambda place: asked.extend([kind, place]), getsockname=lambda: (address, 4711))

    monkeypatch.setattr(group.ray.util, "get_node_ip_address", lambda: address)
    kinds = {"AF_INET": socket.AF_INET, "AF_INET6": socket.AF_INET6}
    monkeypatch.setattr(group, "socket", SimpleNamespace(socket=opened, **kinds))
    monkeypatch.setattr(group, "_set_torch_distributed_env_vars", lambda: None)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.setenv(name, "of Ray's own")
    assert group.meeting() == (address, 4711)
    assert asked == [family, (address, 0)]
    group._tell(address, 4711)
    group._number(3)
    assert [os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")] == [address, "4711", "3"]


def test_a_run_leaves_slow_machines_until_no_others_come(
    config: Config, monkeypatch: pytest.MonkeyPatch, run: Store
) -> None:
    config = config.model_copy(update={"retry": config.retry.model_copy(update={"slow_rank": "replace"})})
    slow = retry.classify({0: SlowMachine("n2 is slower", [1], ["n2/abc"])})
    made = Attempts(config, Datasets("d", None), take(run, "capstan train", 0), resume=False, ends=[slow])
    monkeypatch.setattr(train, "alive_nodes", lambda: {"id1": "n1/123", "id2": "n2/abc"})
    asked, log = list[list[str]](), list[str]()

    def wait_for_room(_config: Config, *, without: list[str], **_: Any) -> None:
        asked.append(without)
        raise ConfigError("no room") if without else Stopped("the end of this test")

    monkeypatch.setattr(train, "wait_for_room", wait_for_room)
    with pytest.raises(Stopped):
        train._Workers(made, "", lambda: None, log.append).attempt()
    assert asked == [["id2"], []]
    assert log == ["the run goes on with its slow machines, as no others took their place: no room"]
    assert made.task()["config"].count("slow_rank: name") or "slow_rank" not in made.task()["config"]
    assert slow.kind == "preemption"


@pytest.mark.parametrize("can_grow", [True, False])
def test_nobody_waits_for_a_lost_machine_of_a_job(
    config: Config, monkeypatch: pytest.MonkeyPatch, run: Store, can_grow: bool
) -> None:
    """At the first start the machines of a job are still joining its Ray."""
    made = Attempts(config, Datasets("d", None), take(run, "capstan train", 0), resume=False)
    asked = list[bool]()

    def wait_for_room(_config: Config, *, can_grow: bool, **_: Any) -> None:
        asked.append(can_grow)
        raise ConfigError("no room")

    monkeypatch.setattr(train, "wait_for_room", wait_for_room)
    monkeypatch.setattr(train, "alive_nodes", dict)
    for ends in ([], [retry.lost_machine("n2")]):
        made.ends = ends
        with pytest.raises(ConfigError):
            train._Workers(made, "", lambda: None, print, can_grow=can_grow).attempt()
    assert asked == [True, can_grow]


@pytest.mark.parametrize(
    ("ranks", "dashboard", "seconds", "notices"),
    [("1024", "", "4.0", "1"), ("8", None, "0.5", "0"), ("null", "", "0.5", "1")],
)
def test_ray_watches_a_runs_ranks_as_closely_as_their_number_allows(
    config: Config,
    run: Store,
    monkeypatch: pytest.MonkeyPatch,
    ranks: str,
    dashboard: str | None,
    seconds: str,
    notices: str,
) -> None:
    begun = list[Any]()

    def local_ray(workers: int) -> Any:
        begun.append(("a Ray here", workers))
        return nullcontext()

    for name in ("HEALTH_CHECK_INTERVAL_S", "ENABLE_PREEMPTION_WATCHER", "WORKER_GROUP_START_TIMEOUT_S"):
        monkeypatch.delenv(f"RAY_TRAIN_{name}", raising=False)
    monkeypatch.setattr(train, "os", SimpleNamespace(environ=(environment := dict[str, str]())))
    monkeypatch.setattr(train, "threading", SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=int)))
    monkeypatch.setattr(train, "local_ray", local_ray)
    monkeypatch.setattr(train, "gpus_for_servers", lambda *_, can_grow, **__: nullcontext(begun.append(can_grow)))
    monkeypatch.setattr(train, "sidecars_on_ray", lambda *_: nullcontext())
    monkeypatch.setattr(train, "keep_trying", lambda *_: begun.append("trained"))
    config = override(config, f"cluster.workers={ranks}", "cluster.ray.start_timeout=900")
    made = Attempts(config, Datasets("d", None), take(run, "capstan train", 0), resume=False)
    train.run_on_ray(made, dashboard, print)
    assert begun == [*([("a Ray here", 8)] if dashboard is None else []), dashboard is not None, "trained"]
    assert environment["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == seconds
    assert environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == notices
    assert environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "900.0"


def test_ranks_are_told_whether_there_must_be_a_checkpoint_and_what_they_read(config: Config, run: Store) -> None:
    owner, datasets = take(run_folder(config), "capstan train", 0), Datasets("d", "e", sets={"general": "g"})
    for resume in (False, True):
        task = Attempts(config, datasets, owner, resume=resume, began=50.0).task()
        assert parse_config(task.pop("config")) == config
        assert task == {"datasets": asdict(datasets), "resume": resume, "began": 50.0}


@pytest.mark.parametrize(("kept", "place"), [(False, "the last commit"), (True, "the last update that is kept")])
def test_it_is_said_where_the_next_attempt_goes_on_from(config: Config, run: Store, kept: bool, place: str) -> None:
    made = Attempts(config, Datasets("d", None), take(run, "capstan train", 0), resume=False, kept=kept)
    run.create(layout.manifest(4), b"a checkpoint")
    log, script = list[str](), iter([ranks_that(1, end=Failure("rank 1 died", None)), ranks_that(2, end=None)])
    attempts.keep_trying(made, lambda: next(script)(run), log.append)
    assert [line.partition(". ")[2].partition(" (")[0].rstrip(".") for line in log] == [f"Starting again from {place}"]


@pytest.mark.parametrize("error", [ConfigError("no room"), Stopped("stopped by alice")], ids=str)
def test_what_ends_a_run_before_its_first_attempt_is_raised_as_it_is(
    config: Config, run: Store, error: CapstanError
) -> None:
    def refused(run: Store) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        drive(config, refused)
    assert caught.value is error
    assert generations(run) == [], "a start that has not begun has no end either"


def test_a_driver_looks_into_the_store_every_two_seconds(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, looked = [100.0], list[float]()
    monkeypatch.setattr(attempts, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    made = Attempts(config, Datasets("d", None), take(run, "capstan train", 0), resume=False)
    watch = Watch(made, lambda training: looked.append(clock[0]))
    for now in (100.5, 101.5, 102.0, 102.5, 103.5, 104.0, 109.0, 110.5, 111.0):
        clock[0] = now
        watch.look()
    assert looked == [102.0, 104.0, 109.0, 111.0]


def test_the_ranks_of_each_attempt_are_told_when_it_began(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count the time until their first step from then."""
    owner, told, clock = take(run_folder(config), "capstan train", 0), list[float](), itertools.count(100.0, 50.0)
    made = Attempts(config, Datasets("d", None), owner, resume=False, began=50.0)
    monkeypatch.setattr(attempts, "time", SimpleNamespace(time=lambda: next(clock), monotonic=time.monotonic))

    def attempt() -> Failure | None:
        told.append(made.task()["began"])
        return NOTHING_STARTED if len(told) < 3 else None

    attempts.keep_trying(made, attempt, print)
    assert told == [50.0, 100.0, 150.0]


def ended(
    config: Config, error: BaseException | None, monkeypatch: pytest.MonkeyPatch, lost: list[str], keepers: Any = None
) -> Any:
    """What a group of workers that ended so is taken for, when these machines are gone. Also for how long they were
    looked for.
    """
    looked = list[float]()
    monkeypatch.setattr(train, "lost_nodes", lambda nodes, within: looked.append(within) or lost)
    owner = take(run_folder(config), "capstan train", newest_number(run_folder(config)))
    attempts = Attempts(config, Datasets("d", None), owner, resume=False)
    workers = train._Workers(attempts, None, lambda: None, print, keepers)
    group: Any = SimpleNamespace(fit=Future[Any](), workers=2, starts=None, resizing=False, nodes={"a": "n2/a"})
    group.fit.set_exception(error) if error else group.fit.set_result(None)
    return workers._end_of_group(group), looked


def of_workers(**failures: BaseException) -> WorkerGroupError:
    return WorkerGroupError("", {int(rank.removeprefix("rank")): error for rank, error in failures.items()})  # type: ignore[arg-type]


def test_the_end_of_rays_workers_is_that_of_their_ranks(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(config, None, monkeypatch, []) == (None, [])
    ours = UserExceptionWithTraceback(ConfigError("tensor missing"), "")
    found, looked = ended(config, of_workers(rank0=RuntimeError("reset"), rank1=ours), monkeypatch, ["n2/a"])
    assert (str(found.error), looked) == ("tensor missing", []), "the ranks' own error, whatever else is gone"
    died = RayActorError()
    found, looked = ended(config, of_workers(rank1=died), monkeypatch, ["n2/a"])
    assert (found.kind, found.reason, looked) == ("preemption", "lost a machine: n2/a", [0])
    found, looked = ended(config, of_workers(rank1=died), monkeypatch, [])
    assert (found.kind, found.died, looked) == ("failure", 1, [0])
    order = SimpleNamespace(order=SimpleNamespace(remote=lambda: [1, 0]))
    monkeypatch.setattr(group.ray, "get", lambda found: found)
    found, _ = ended(config, of_workers(rank1=died), monkeypatch, [], keepers=order)
    assert found.died == 0, "as the keepers have numbered them"
    unreachable = ActorUnavailableError("no answer", None)
    found, looked = ended(config, of_workers(rank0=unreachable), monkeypatch, ["n2/a"])
    assert (found.reason, looked) == ("lost a machine: n2/a", [train._LOSS_SECONDS]), "a dead node shows later"


def test_a_group_that_ray_could_not_start_says_why(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = ended(config, ControllerError(ValueError("no room\nmore")), monkeypatch, [])
    assert (found.reason, found.error) == ("Ray could not start the ranks (ValueError: no room)", None)
    ours = RayTaskError("start", "", ConfigError("wrong"))
    found, _ = ended(config, ControllerError(ours), monkeypatch, [])
    assert isinstance(found.error, ConfigError)


def test_a_rank_that_ray_ends_for_its_hosts_memory_does_not_fit() -> None:
    found = train._original(OutOfMemoryError("the node ran low"))
    assert isinstance(found, DoesNotFit)
    assert "ran low on host memory (the node ran low)" in str(found)


def test_rows_that_cannot_be_compiled_on_a_cluster_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = list[bool]()
    monkeypatch.setattr("ray.wait", lambda asked, **_: (asked if len(looks) > 1 else [], []))

    def fails(error: Exception) -> Any:
        def get(reference: Any) -> None:
            raise error

        monkeypatch.setattr("ray.get", get)
        data._next(deque([(object(), "a.jsonl: the rows from 7 on", None)]), print, lambda: looks.append(True))

    with pytest.raises(StorageError, match="^503$"):
        fails(RayTaskError("work", "", StorageError("503")))
    assert len(looks) == 2, "a stop is noticed meanwhile"
    with pytest.raises(ConfigError, match="a machine cannot import Capstan or what it needs"):
        fails(RayTaskError("work", "", ImportError("No module named 'launcher'")))
    with pytest.raises(ConfigError, match="a machine cannot import Capstan or what it needs"):
        fails(RayTaskError("work", "The remote function failed to import on the worker.", RuntimeError()))
    with pytest.raises(RayTaskError):
        fails(RayTaskError("work", "", ValueError("a mistake of ours")))
    with pytest.raises(
        DataError, match=r"a\.jsonl: the rows from 7 on cannot be compiled .* their process died 6 times"
    ):
        fails(WorkerCrashedError())
    with pytest.raises(CapstanError, match=r"a\.jsonl: the rows from 7 on cannot be compiled on the cluster \("):
        fails(RayActorError())


def test_a_cluster_whose_cpus_are_on_their_way_compiles_a_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[int]()
    for resources in ({}, {"CPU": 0.0}, {"CPU": 12.0}):
        monkeypatch.setattr("ray.cluster_resources", lambda resources=resources: resources)
        found.append(data._cpus())
    assert found == [1, 1, 12]


def test_rows_that_wait_on_a_cluster_are_cancelled_where_the_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled, task = list[int](), SimpleNamespace(remote=lambda handle, batch: batch.first)
    monkeypatch.setattr("ray.remote", lambda **_: lambda function: task)
    monkeypatch.setattr("ray.put", lambda start: "handle")
    monkeypatch.setattr("ray.wait", lambda asked, **_: (asked, []))
    monkeypatch.setattr("ray.get", lambda reference: reference)
    monkeypatch.setattr("ray.cancel", lambda reference, force: cancelled.append(reference))
    monkeypatch.setattr(data, "_cpus", lambda: 1)
    work: Any = [(SimpleNamespace(uri="a.jsonl", first=number), f"of {number}") for number in range(9)]
    found: Any = data.map_on_cluster(lambda line: None, lambda: None, work, lambda: print)
    assert next(found) == (0, "of 0")
    found.close()
    assert cancelled == [1, 2, 3], "three for each CPU are under way"


def test_a_process_of_the_cluster_keeps_a_tokenizer_for_the_rows_of_one_data_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = list[bytes]()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr("gc.freeze", lambda: None)
    monkeypatch.setattr(data, "_worker", None)
    monkeypatch.setattr("ray.get", lambda name: lambda: started.append(name) or (lambda batch: (name, batch)))
    work: Any = data._work
    assert [work([name], number) for number, name in enumerate((b"a", b"a", b"b"))] == [(b"a", 0), (b"a", 1), (b"b", 2)]
    assert started == [b"a", b"b"]
