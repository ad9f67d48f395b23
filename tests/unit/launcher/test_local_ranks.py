"""A run of local ranks without Ray: how the ends of their processes become an end of the run."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.policy import retry
from launcher.start import local_ranks
from launcher.start.attempts import Attempts
from launcher.start.keeper import Unprepared
from launcher.start.local_ranks import GivenUp, outcome_of, ranks_here, run_here
from launcher.view.status import read_status
from trainer.config import Config, dump_config, override, parse_config
from trainer.data.compile.prepare import Datasets
from trainer.data.format.pictures import BadPicture
from trainer.errors import CapstanError, ConfigError, DataError, NonFiniteLoss, SlowMachine, StorageError
from trainer.evaluate.rollout.rewards import RewardFailed
from trainer.processes import children
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.run.owner import take


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = (
        f"run: {{name: one, store: {tmp_path}}}\nmodel: {{base: /m}}\ndata: {{train: [{{path: d}}]}}\ntrain:"
        " {steps: 2}"
    )
    return parse_config(text + "\nretry: {failures: 1}")


def drive(config: Config, monkeypatch: pytest.MonkeyPatch, *programs: str, ranks: int = 1) -> list[str]:
    """Run the driver over ranks that are these programs in turn, whose arguments are the files of the task and of the
    outcome.
    """
    script, log = iter(programs), list[str]()

    def start(command: list[str], **options: Any) -> "subprocess.Popen[Any]":
        return children.start([sys.executable, "-c", f"import sys; {next(script)}", *command[3:]], **options)

    monkeypatch.setattr(local_ranks, "children", type("", (), {"start": staticmethod(start)}))
    monkeypatch.setattr(local_ranks, "_LOOK_SECONDS", 0.05)
    owner = take(run_folder(config), "capstan train", 0)
    run_here(Attempts(config, Datasets("d", None), owner, resume=False), ranks, log.append)
    assert next(script, None) is None
    assert log[0] == f"launch: starts {('the process of 1 rank', 'the processes of 2 ranks')[ranks - 1]}"
    return [line for line in log if not line.startswith("launch: ")]


def ends_with(error: BaseException) -> str:
    return f"open(sys.argv[2], 'w').write({json.dumps(outcome_of(error))!r}); sys.exit(1)"


DONE = "import json; json.load(open(sys.argv[1])); open(sys.argv[2], 'w').write('{}')"


def test_a_keeper_that_cannot_fork_is_told_of_once_and_the_ranks_start_without_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses:
        def __init__(self, gpus: int | None) -> None: ...

        def __enter__(self) -> "Refuses":
            return self

        def __exit__(self, *_: object) -> None: ...

        def start(self, *_: Any, **__: Any) -> None:
            raise Unprepared("the imports of a rank begin CUDA")

    monkeypatch.setattr(local_ranks, "OwnKeeper", Refuses)
    kept = override(config, "cluster.keeper=true", "cluster.workers=2")
    assert drive(kept, monkeypatch, DONE, DONE, ranks=2) == [
        "cluster.keeper: the imports of a rank begin CUDA. The ranks start without it."
    ]


@pytest.mark.parametrize(("serving", "devices"), [(0, None), (1, "GPU-a,GPU-b"), (2, "GPU-a")])
def test_ranks_do_not_see_the_devices_of_servers(
    serving: int, devices: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "visible_gpus", lambda: ["GPU-a", "GPU-b", "GPU-c"])
    seen, ended = list[tuple[str, str | None]](), list[str]()

    def start(arguments: Any, environment: dict[str, str], said: Path) -> Any:
        seen.append((environment["RANK"], environment.get("CUDA_VISIBLE_DEVICES")))
        return SimpleNamespace(kill=lambda: ended.append("killed"), wait=lambda: ended.append("waited for"))

    with local_ranks._started(tmp_path / "task.json", 2, serving, start) as group:
        assert [rank.outcome.name for rank in group] == ["outcome.json-0", "outcome.json-1"]
        assert not ended
    assert seen == [("0", devices), ("1", devices)]
    assert ended == ["killed"] * 2 + ["waited for"] * 2


def test_a_rank_that_is_done_ends_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drive(config, monkeypatch, DONE) == []


def test_a_rank_that_is_killed_is_started_again_and_a_second_death_ends_the_run(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    (why,) = drive(config, monkeypatch, KILLED, DONE)
    assert why.startswith("rank 0 died: its process was killed by signal 9. Starting again")
    with pytest.raises(CapstanError, match=r"rank 0 died: its process ended with exit code 3 \(no memory\).*failure 2"):
        drive(override(config, "run.name=two"), monkeypatch, KILLED, "print('no memory', file=sys.stderr); sys.exit(3)")
    status = read_status(run_folder(override(config, "run.name=two")))
    assert (status.state, status.reason) == ("failed", "rank 0 died: its process ended with exit code 3 (no memory)")


@pytest.mark.parametrize("error", [ConfigError("wrong"), NonFiniteLoss("nan", {"epoch": 0})], ids=str)
def test_an_error_of_ours_keeps_its_kind(config: Config, monkeypatch: pytest.MonkeyPatch, error: CapstanError) -> None:
    rules = override(config, "retry.skip_bad_window=false")
    with pytest.raises(type(error), match=str(error)) as caught:
        drive(rules, monkeypatch, ends_with(error))
    assert getattr(caught.value, "window", None) == getattr(error, "window", None)


@pytest.mark.parametrize(("raised", "kind"), [(RewardFailed, CapstanError), (BadPicture, DataError)])
def test_an_error_of_another_module_is_the_nearest_of_those_that_all_know(
    raised: type[CapstanError], kind: type[CapstanError]
) -> None:
    found = local_ranks._error(json.loads(json.dumps(outcome_of(raised("rollout.reward: mine:f gave 1 number.")))))
    assert type(found) is kind
    assert str(found) == "rollout.reward: mine:f gave 1 number."


def test_an_error_with_facts_of_its_own_keeps_them() -> None:
    slow = local_ranks._error(json.loads(json.dumps(outcome_of(SlowMachine("n2 is slower", [1], ["n2/abc"])))))
    assert isinstance(slow, SlowMachine)
    assert (str(slow), slow.ranks, slow.machines) == ("n2 is slower", [1], ["n2/abc"])


def test_a_certain_crash_ends_the_run_at_its_second_time(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    rules, crash = override(config, "retry.failures=9"), ends_with(IndexError("list index out of range"))
    with pytest.raises(
        CapstanError, match="IndexError: list index out of range. It is the second crash before the first"
    ):
        drive(rules, monkeypatch, crash, ends_with(StorageError("503")), crash)


def test_a_stop_that_need_not_wait_for_a_step_ends_the_rank(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(config)
    run.create(layout.manifest(4), b"a checkpoint")
    monkeypatch.setattr("launcher.start.attempts._LOOK_SECONDS", 0.0)
    run.put(layout.STOP, b"{}")
    with pytest.raises(CapstanError, match="stopped by somebody while the run was starting") as caught:
        drive(config, monkeypatch, WAITS)
    assert caught.value.exit_code == 75


KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
WAITS = "import time; time.sleep(60)"


def test_a_rank_that_is_killed_ends_those_that_wait_for_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ranks, "_LAST_WORDS_SECONDS", 0.2)
    (why,) = drive(config, monkeypatch, WAITS, KILLED, DONE, DONE, ranks=2)
    assert why.startswith("rank 1 died: its process was killed by signal 9. Starting again")


@pytest.mark.parametrize(
    ("codes", "kept", "seconds"),
    [
        ((-signal.SIGKILL, None, 0), True, 0.3),  # a neighbour has its memory, and only waits
        ((-signal.SIGKILL, None, 0), False, 5.0),
        ((-signal.SIGKILL, None, 1), True, 5.0),  # the other failed by itself, and may have more to say
        ((1, None, None), True, 5.0),
    ],
)
def test_those_that_are_left_have_a_moment_for_their_last_words(
    codes: tuple[int | None, ...], kept: bool, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, killed = [0.0], list[float]()

    class Rank:
        def __init__(self, code: int | None) -> None:
            self.returncode = code

        def poll(self) -> int | None:
            return self.returncode

        def kill(self) -> None:
            killed.append(clock[0])
            self.returncode = -signal.SIGKILL

        def wait(self) -> int:
            return self.returncode or 0

    def sleep(passed: float) -> None:
        clock[0] += passed

    monkeypatch.setattr(local_ranks, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    left = local_ranks.end_together([Rank(code) for code in codes], kept=kept)
    assert left == [number for number, code in enumerate(codes) if code is None]
    assert killed == [pytest.approx(seconds + 0.1, abs=0.15)] * len(left)


def test_the_cause_is_what_the_first_rank_to_fail_has_said(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = f"import time; time.sleep(0.3); {ends_with(RuntimeError('connection closed by peer'))}"
    (why,) = drive(config, monkeypatch, lost, ends_with(IndexError("list index out of range")), DONE, DONE, ranks=2)
    assert why.startswith("rank 1 failed: IndexError: list index out of range. Starting again")


def test_an_error_of_ours_is_the_cause_though_it_comes_late(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    late = f"import time; time.sleep(0.3); {ends_with(ConfigError('wrong'))}"
    with pytest.raises(ConfigError, match="wrong"):
        drive(config, monkeypatch, KILLED, late, ranks=2)


def test_a_rank_alone_has_no_place_among_others() -> None:
    assert local_ranks.places(1) == [{}]


def test_each_rank_has_its_place(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    tell = (
        f"import os; open({str(tmp_path)!r} + '/place-' + os.environ['RANK'], 'w').write(' '.join(map(os.environ.get,"
        f" {names})))"
    )
    drive(config, monkeypatch, *[f"{tell}; {DONE}"] * 2, ranks=2)
    (*first, port), (*second, same) = ((tmp_path / f"place-{rank}").read_text().split() for rank in range(2))
    assert (first, second) == (["0", "0", "2", "2", "127.0.0.1"], ["1", "1", "2", "2", "127.0.0.1"])
    assert port == same


def test_ranks_stay_here_unless_they_ask_for_ray(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, given, expected in (
        (0, "", 1),
        (1, "", 1),
        (2, "", 2),
        (2, "cluster.workers=1", 1),
        (2, "cluster.workers=[1, 8]", 2),
        (2, "cluster.workers=4", None),
        (2, "cluster.gpus_per_worker=0", 1),
        (0, "cluster.workers=2", 2),
        (0, "cluster.workers=[1, 2]", 2),
        (0, "cluster.ray.resources={special: 1}", None),
        (0, "cluster.ray.address=local", None),
    ):
        monkeypatch.setattr(local_ranks, "local_gpus", lambda gpus=gpus: gpus)
        assert ranks_here(override(config, given) if given else config) == expected, given


@pytest.mark.parametrize(
    ("number", "confirmed"), [(signal.SIGKILL, True), (signal.SIGSEGV, True), (signal.SIGABRT, False)]
)
def test_a_rank_that_aborts_may_only_have_lost_another(tmp_path: Path, number: int, confirmed: bool) -> None:
    """NCCL and gloo abort the ranks that are left. Whether a machine is lost is then looked at for longer."""
    process: Any = SimpleNamespace(wait=lambda: -number)
    (tmp_path / "said").write_text("a warning of before\n")
    error = local_ranks._Rank(process, tmp_path / "outcome.json", tmp_path / "said").error()
    assert isinstance(error, retry.RankDied)
    assert (str(error), error.confirmed) == (f"its process was killed by signal {number}", confirmed)


@pytest.mark.parametrize("error", [None, StorageError("503"), IndexError("list index out of range")], ids=str)
def test_a_rank_writes_down_how_it_ended(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    asked = list[Any]()

    def run_rank(config: Config, datasets: Datasets, *, resume: bool, starter: Any) -> None:
        asked.extend([config, datasets.train, datasets.sets, resume, starter.machine, starter.began])
        if error:
            raise error

    monkeypatch.setattr(local_ranks, "imported_rank", lambda gpus: run_rank)
    datasets = Datasets("d", None, sets={"general": "g"})
    task = {"config": dump_config(config), "datasets": asdict(datasets), "resume": True, "began": 5.0, "machine": "n1"}
    given, outcome = tmp_path / "task.json", tmp_path / "outcome.json"
    given.write_text(json.dumps(task))
    if error is None:
        local_ranks.run_task(given, outcome)
        assert outcome.read_text() == "{}"
    else:
        with pytest.raises(SystemExit) as ended:
            local_ranks.run_task(given, outcome)
        assert ended.value.code == 1
        said = local_ranks._error(json.loads(outcome.read_text()))
        assert (type(said).__name__, str(said)) == (type(error).__name__, str(error))
    assert asked == [config, "d", {"general": "g"}, True, "n1", 5.0]


def test_a_forked_rank_begins_with_what_is_kept_and_tells_of_its_steps_if_it_is_asked_to(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starters, handlers = list[Any](), dict[int, Any]()
    monkeypatch.setattr(local_ranks, "imported_rank", lambda gpus: lambda *_, starter, **__: starters.append(starter))
    monkeypatch.setattr(local_ranks.signal, "signal", handlers.__setitem__)
    kept, leaving = object(), threading.Event()
    forked: Any = SimpleNamespace(kept=kept, leaving=leaving, stepped=lambda record: None)
    task = {"config": dump_config(config), "datasets": None, "resume": False, "began": 5.0}
    for tells in (False, True):
        (tmp_path / "task.json").write_text(json.dumps({**task, "tells": tells}))
        local_ranks.run_task(tmp_path / "task.json", tmp_path / "outcome.json", forked)
    assert [starter.kept for starter in starters] == [kept, kept]
    assert [starter.observe is forked.stepped for starter in starters] == [False, True]
    assert [starter.preempted() for starter in starters] == [False, False]
    handlers[signal.SIGUSR2](signal.SIGUSR2, None)
    assert [starter.preempted() for starter in starters] == [True, True]


class Forked:
    """A rank that a keeper has forked, which ends at the third look."""

    ended_at = None

    def __init__(self, outcome: Path, at_look: Callable[[], None] = lambda: None, wrote: str = "{}") -> None:
        self.outcome, self.at_look, self.wrote, self.looks, self.signals = outcome, at_look, wrote, 0, list[int]()

    def heard(self, seconds: float) -> int | None:
        self.looks += 1
        self.at_look()
        if self.looks < 3:
            return None
        self.outcome.write_text(self.wrote)
        return 0

    def signal(self, number: int) -> None:
        self.signals.append(number)

    def kill(self) -> None:
        self.signals.append(signal.SIGKILL)

    def wait(self) -> int:
        return 0


def forked_by(made: list[Forked], at_look: Callable[[], None] = lambda: None, wrote: str = "{}") -> Any:
    def start(arguments: list[str], environment: Any, **_: Any) -> Forked:
        made.append(Forked(Path(arguments[1]), at_look, wrote))
        return made[0]

    return SimpleNamespace(start=start)


def test_a_task_passes_on_to_its_forked_rank_that_it_is_to_stop_and_that_its_machine_leaves() -> None:
    made, before = list[Forked](), [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]

    def at_look() -> None:
        if made[0].looks == 1:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGUSR1)

    local_ranks.forked_rank(forked_by(made, at_look), {}, leaves=lambda: True)
    assert made[0].signals == [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL], "it leaves once"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_what_ended_a_forked_rank_is_raised_where_it_was_asked_for_in_any_thread() -> None:
    wrote = json.dumps(outcome_of(DataError("no rows")))
    with pytest.raises(DataError, match="no rows"):
        local_ranks.forked_rank(forked_by([], wrote=wrote), {})
    made, ended, before = list[Forked](), list[str](), signal.getsignal(signal.SIGTERM)

    def ask() -> None:
        """Signals come to the main thread alone, so another one has none to pass on."""
        local_ranks.forked_rank(forked_by(made), {})
        ended.append("done")

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert (ended, made[0].signals) == (["done"], [signal.SIGKILL])
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_forked_rank_that_waits_in_vain_is_killed_once_it_was_asked_to_stop() -> None:
    made, asked = list[Forked](), list[bool]()

    def hopeless(is_asked: bool) -> bool:
        asked.append(is_asked)
        return is_asked

    def at_look() -> None:
        if made[0].looks == 2:
            signal.raise_signal(signal.SIGUSR1)

    with pytest.raises(GivenUp, match="another rank has died"):
        local_ranks.forked_rank(forked_by(made, at_look), {}, hopeless=hopeless)
    assert asked == [False, True]
    assert made[0].signals == [signal.SIGUSR1, signal.SIGKILL]
