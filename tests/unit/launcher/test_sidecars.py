"""Beside a run that learns from what servers sample processes are kept alive: the servers, where they start with the
run, and the one that asks them.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.filesize import decimal

from launcher.cluster.ray import sidecars as on_ray
from launcher.cluster.ray.sidecars import sidecars_on_ray
from launcher.cluster.slurm import submit
from launcher.plan.notes import _of_rollouts
from launcher.plan.planning import plan_run
from launcher.start import local_ranks, sidecars
from launcher.start.local_ranks import check_servers_here, count_ranks, gpus_of_server
from launcher.start.sidecars import (
    Child,
    Sidecar,
    keep_server,
    server_command,
    sidecars_alive,
    sidecars_here,
    sidecars_of,
    sidecars_sentence,
)
from tests.dist import stub_server
from tests.material import SEQUENCE, Workshop
from trainer.config import Config, dump_config, override
from trainer.errors import CapstanError, ConfigError, DataError, NotFound
from trainer.plan.resolve import resolve
from trainer.processes import children, guard
from trainer.processes.devices import visible_gpus
from trainer.run import layout
from trainer.run.segments import read_stream
from trainer.store.store import Store

SERVERS = ("objective.name=grpo", "rollout.reward=exact", "rollout.engine=[http://gpu-1:8000]")
STUB = f"rollout.serve.command=[{sys.executable}, {stub_server.__file__}]"
SERVE = (*SERVERS, "rollout.engine=serve", STUB, "rollout.serve.gpus=0")
FAILS = "import sys, time; print('no server answers', file=sys.stderr)"
STAYS = "import sys, time; print('sampled', file=sys.stderr, flush=True); time.sleep(600)"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("beside"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_LOOK_SECONDS", "_SERVER_LOOK_SECONDS", "_PLACED_AGAIN_SECONDS"):
        monkeypatch.setattr(sidecars, name, 0.02)
    monkeypatch.setattr(sidecars, "_SERVER_END_SECONDS", 0.5)


def until(holds: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@contextmanager
def kept(keep: Callable[..., None], *given: Any) -> Iterator[list[str]]:
    """What is told while it is kept in a thread, which has ended behind the block."""
    over, told = threading.Event(), list[str]()
    thread = threading.Thread(target=keep, args=(*given, over, told.append))
    thread.start()
    try:
        yield told
    finally:
        over.set()
        thread.join(30)
    assert not thread.is_alive()


def test_the_process_that_asks_servers_is_started_again_and_ends_with_the_run(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, commands = iter((f"{FAILS}; sys.exit(1)", f"{FAILS}; sys.exit(1)", STAYS)), list[list[str]]()
    started, run, real = list[subprocess.Popen[bytes]](), workshop.store.sub("first"), children.family

    @contextmanager
    def family(command: list[str], *given: Any, **options: Any) -> Iterator[Any]:
        commands.append(command)
        with real([sys.executable, "-c", next(programs)], *given, **options) as process:
            started.append(process)
            yield process

    monkeypatch.chdir("/")
    monkeypatch.setattr(sidecars.children, "family", family)
    monkeypatch.setattr(sidecars, "AGAIN_SECONDS", 0.01)
    with kept(sidecars._keep_asking, run) as told:
        until(lambda: len(started) == 3 and b"sampled" in said(run, "rollout"))
        assert started[-1].poll() is None
    assert started[-1].poll() == -signal.SIGTERM
    assert {tuple(command[1:]) for command in commands} == {
        ("-P", "-m", "launcher.cli", "rollout", run.uri, "--trust-run")
    }
    assert said(run, "rollout") == b"no server answers\nno server answers\nsampled\n"
    assert told == ["capstan rollout ended with exit code 1: no server answers; it is started again every 0.01 s"]


def said(run: Store, name: str) -> bytes:
    try:
        return read_stream(run, layout.LOGS, layout.sidecar_log(1, name))
    except NotFound:
        return b""


def test_what_is_lost_is_placed_again_and_all_ends_with_the_run(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told, placed = workshop.store.sub("placed"), list[str](), dict[str, list[Child]]()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("SLURM_PROCID", "0")
    seen = "import os, sys, time; print(sorted({'RANK', 'SLURM_PROCID'} & {*os.environ}), flush=True)"

    def place(one: Sidecar) -> Child:
        again = placed.setdefault(one.name, [])
        program = f"{seen}; sys.exit(3)" if one.name == "server-1" and not again else f"{seen}; time.sleep(600)"
        again.append(Child([sys.executable, "-c", program], {}))
        return again[-1]

    run.put(layout.server("server-7"), b"http://of-a-start-that-was-killed")
    with sidecars_alive(
        sidecars_of(workshop.config("placed", *SERVE, "rollout.serve.replicas=2")), run, place, told.append
    ):
        assert not run.exists(layout.server("server-7"))
        until(lambda: told.count("[]") == 4)
        assert {name: len(children) for name, children in placed.items()} == {
            "server-1": 2,
            "server-2": 1,
            "rollout": 1,
        }
    processes = [child._process for one in placed.values() for child in one]
    assert [process.poll() for process in processes] == [3, -15, -15, -15]
    lost = "server-1: the process that keeps it ended with exit code 3; it is started again"
    assert [line for line in told if line != "[]"] == [lost]


@pytest.mark.parametrize(("servers", "left"), [(True, []), (False, ["server-1"])], ids=["its own", "placed elsewhere"])
def test_the_servers_of_a_start_that_was_killed_are_asked_no_more(
    workshop: Workshop, servers: bool, left: list[str]
) -> None:
    config, run = workshop.config("again", *SERVE), workshop.store.sub("again")
    run.put(layout.server("server-1"), b"http://of-a-start-that-was-killed")
    placed: Any = SimpleNamespace(words=lambda: iter(()), end=lambda: None)
    with sidecars_alive(sidecars_of(config, servers=servers), run, lambda one: placed, print):
        assert [entry.key for entry in run.list(layout.SERVERS)] == [layout.server(name) for name in left]


def test_a_server_is_kept_alive_where_capstan_rollout_finds_it_and_leaves_nothing(workshop: Workshop) -> None:
    config, run = workshop.config("serves", *SERVE, "rollout.serve.options=[--engine]"), workshop.store.sub("serves")
    key = layout.server("server-1")
    with kept(keep_server, config, run, "server-1", "127.0.0.1") as told:
        url = run.get(until(lambda: run.exists(key) and key))
        first, engine = until(lambda: len(found := of(workshop)) == 2 and sorted(found))
        os.kill(first, signal.SIGKILL)
        until(lambda: engine not in of(workshop))
        until(lambda: len(of(workshop)) == 2 and run.exists(key))
        assert run.get(key) == url  # who asks it need not be told
    assert not of(workshop)
    assert not run.exists(key)
    assert [line.partition(",")[0].partition(" at ")[0] for line in told] == [
        *(began := [f"server-1: {sys.executable} {stub_server.__file__} starts on {socket.gethostname()}", "server-1 answers"]),
        f"server-1 ended with exit code -9: serves {config.model.base} on GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')} of ['{config.model.base}'",
        *began,
    ]  # fmt: skip
    assert said(run, "server-1").count(b"serves ") == 2


def of(workshop: Workshop) -> list[int]:
    """The servers of its base, and what they have started."""
    base, found = str(workshop.base).encode(), list[int]()
    for number in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if base in words or b"engine of " + base in words:
            found.append(number)
    return found


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        (["rollout.serve.options=[--broken]"], DataError, "rollout.serve: server-1 ended with exit code 1: .*the engine did not start. It has died 3 times in a row"),
        (["rollout.serve.options=[--silent]", "rollout.serve.start_seconds=0.3"], ConfigError, r"start_seconds: server-1 has not answered http://127.0.0.1:\d+/health within 0.3 s; it said last: "),
        (["rollout.serve.command=[no-such-program, serve]"], ConfigError, "rollout.serve.command: 'no-such-program' does not start on .*not found"),
        (["rollout.serve.command=[/etc/hostname]"], ConfigError, "rollout.serve.command: '/etc/hostname' does not start on"),
    ],
    ids=["broken", "silent", "missing", "no-program"],
)  # fmt: skip
def test_a_server_that_does_not_come_up_is_a_sentence(
    workshop: Workshop, settings: list[str], kind: type[CapstanError], words: str
) -> None:
    config = workshop.config("fails", *SERVE, *settings)
    with pytest.raises(kind, match=words):
        keep_server(config, workshop.store.sub("fails"), "server-1", "127.0.0.1", threading.Event(), print)
    assert not of(workshop)


@pytest.mark.parametrize("killed", ["keeper", "keeper's parent"])
def test_a_server_ends_with_its_keeper_however_that_ends(workshop: Workshop, killed: str) -> None:
    config, run = workshop.config("orphan", *SERVE, "rollout.serve.options=[--engine]"), workshop.store.sub("orphan")
    run.put(layout.CONFIG, dump_config(config).encode())
    command = Sidecar("server-1", 0, is_near=False).command(run.uri, "127.0.0.1")
    parent = f"from trainer.processes import children; children.run({command!r})"
    whole = [sys.executable, "-c", parent] if killed == "keeper's parent" else command
    with subprocess.Popen(whole, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[3]) as process:
        until(lambda: len(of(workshop)) == 2)
        process.kill()
    until(lambda: not of(workshop), guard.PATIENCE_SECONDS + 5)


def test_a_server_that_answered_for_long_may_die_again(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lives, told = [0.0], iter([700.0, 1.0, 700.0, 1.0, 1.0]), list[str]()

    class Dies:
        def __init__(self, run: Store, name: str) -> None: ...

        @contextmanager
        def running(self, command: list[str], environment: dict[str, str]) -> Iterator[Any]:
            clock[0] += next(lives)
            yield SimpleNamespace(returncode=1)

        def last_words(self, lines: int) -> str:
            return "no more"

        def close(self) -> None: ...

    monkeypatch.setattr(sidecars, "Program", Dies)
    monkeypatch.setattr(sidecars, "_watch", lambda *_: None)
    monkeypatch.setattr(sidecars, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with pytest.raises(DataError, match="exit code 1: no more. It has died 3 times in a row"):
        keep_server(
            workshop.config("dies", *SERVE), workshop.store, "server-1", "127.0.0.1", threading.Event(), told.append
        )
    assert not list(lives)
    assert sum("is started again" in line for line in told) == 4


def test_a_server_that_falls_silent_is_ended_to_be_started_again(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, told = [0.0], list[str]()

    def waited(seconds: float) -> bool:
        clock[0] += 10
        return clock[0] > 1000

    monkeypatch.setattr(sidecars, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(sidecars, "is_healthy", lambda url: 20 < clock[0] <= 100)
    config, run = workshop.config("quiet", *SERVE, "rollout.serve.start_seconds=60"), workshop.store.sub("quiet")
    program: Any = SimpleNamespace(keep=lambda: None)
    process: Any = SimpleNamespace(poll=lambda: None)
    over: Any = SimpleNamespace(wait=waited)
    sidecars._watch(config, run, "server-1", "http://a", program, process, over, told.append)
    assert told == [
        "server-1 answers at http://a, 30 s after its start",
        "server-1 has been silent for 60 s, and is killed",
    ]
    assert clock[0] == 170


def test_a_server_that_does_not_answer_yet_is_reported_now_and_then_until_its_time_is_over(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, told = [0.0], list[str]()

    def waited(seconds: float) -> bool:
        clock[0] += 10
        return False

    monkeypatch.setattr(sidecars, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(sidecars, "is_healthy", lambda url: False)
    config = workshop.config("late", *SERVE, "rollout.serve.start_seconds=200")
    program: Any = SimpleNamespace(keep=lambda: None, last_words=lambda lines: f"its last {lines}")
    process: Any = SimpleNamespace(poll=lambda: None)
    over: Any = SimpleNamespace(wait=waited)
    with pytest.raises(ConfigError, match=r"has not answered http://a/health within 200 s; it said last: its last 3\."):
        sidecars._watch(config, workshop.store.sub("late"), "server-1", "http://a", program, process, over, told.append)
    assert clock[0] == 210
    assert told == [
        f"server-1 does not answer yet, {seconds} s after its start; it said last: its last 1" for seconds in (70, 140)
    ]


def test_a_port_that_is_taken_is_not_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert sidecars._free_port("127.0.0.1", port) != port
    assert sidecars._free_port("127.0.0.1", port) == port


def test_the_command_has_what_the_run_needs_of_vllm(workshop: Workshop) -> None:
    config = workshop.config("words", *SERVERS, "rollout.engine=serve", "tuning.rank=40", "model.dtype=fp32")
    assert server_command(config, "10.0.0.1", 8001, 64)[1:] == [
        "serve", str(workshop.base), "--host=10.0.0.1", "--port=8001", "--served-model-name=base", "--dtype=float32", "--max-model-len=64",
        "--enable-lora", "--max-loras=2", "--max-lora-rank=64",
    ]  # fmt: skip
    more = override(config, "rollout.serve={gpus: 4, command: [x], base: /as-quantized, options: [--max-model-len=32]}")
    assert server_command(more, "10.0.0.1", 8001, 64)[:2] == ["x", "/as-quantized"]
    assert server_command(more, "10.0.0.1", 8001, 64)[-2:] == ["--tensor-parallel-size=4", "--max-model-len=32"]
    pinned = config.model.model_copy(update={"revision": "v2"})
    commands = [server_command(one.model_copy(update={"model": pinned}), "10.0.0.1", 1, 64) for one in (config, more)]
    assert ["--revision=v2" in words for words in commands] == [True, False], "another base has revisions of its own"
    ranks = (
        (["tuning.rank=16"], 16),
        (["tuning.experts=true", "tuning.experts_rank=65"], 128),
        (["tuning.rank=999"], 999),
    )
    for settings, largest in ranks:
        words = server_command(override(config, *settings), "10.0.0.1", 8001, 64)
        assert f"--max-lora-rank={largest}" in words, "one that vLLM has, for all that learns"


@pytest.mark.parametrize(("positions", "asked"), [(16, 16), (4096, SEQUENCE), (None, SEQUENCE)])
def test_a_server_takes_texts_of_the_runs_length_that_the_base_has_positions_for(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, positions: int | None, asked: int
) -> None:
    commands, told, over = list[list[str]](), list[str](), threading.Event()

    class Notes:
        def __init__(self, run: Store, name: str) -> None: ...

        @contextmanager
        def running(self, command: list[str], environment: dict[str, str]) -> Iterator[Any]:
            commands.append(command)
            over.set()
            yield SimpleNamespace(returncode=0)

        def close(self) -> None: ...

    base = SimpleNamespace(architecture=SimpleNamespace(positions=positions))
    monkeypatch.setattr(sidecars, "resolve_base", lambda model: base)
    monkeypatch.setattr(sidecars, "Program", Notes)
    monkeypatch.setattr(sidecars, "_watch", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    keep_server(workshop.config("long", *SERVE), workshop.store, "server-1", "127.0.0.1", over, told.append)
    (command,) = commands
    assert f"--max-model-len={asked}" in command
    assert told == [f"server-1: {' '.join(command[:2])} starts on {socket.gethostname()}, on CPUs"]


@pytest.mark.parametrize(
    ("visible", "words"),
    [(None, "on all of its GPUs"), ("", "on CPUs"), ("2,3", "on GPU 2,3")],
    ids=["all", "none", "two"],
)
def test_it_is_told_where_a_server_computes(monkeypatch: pytest.MonkeyPatch, visible: str | None, words: str) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sidecars._devices() == words


def test_a_program_that_is_given_by_its_path_finds_those_beside_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    paths = {
        command: sidecars._environment(workshop.config("path", *SERVE, f"rollout.serve.command=[{command}, serve]"))
        for command in ("/opt/vllm/bin/vllm", "vllm")
    }
    assert {command: given["PATH"] for command, given in paths.items()} == {
        "/opt/vllm/bin/vllm": "/opt/vllm/bin:/usr/bin",
        "vllm": "/usr/bin",
    }
    assert {given["CAPSTAN_STORE"] for given in paths.values()} == {workshop.store.uri}


def test_the_last_words_of_a_program_are_its_last_lines(workshop: Workshop) -> None:
    program = sidecars.Program(workshop.store.sub("words"), "server-1")
    assert program.last_words(3) == "it said nothing"
    talks = "print(*range(5), sep='\\n'); print(); print('x' * 700)"
    with program.running([sys.executable, "-c", talks], dict(os.environ)) as process:
        process.wait()
    program.close()
    assert program.last_words(1) == "x" * 600
    assert program.last_words(3) == f"3 | 4 | {'x' * 700}"[-600:]
    assert said(workshop.store.sub("words"), "server-1").startswith(b"0\n1\n2\n")


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None = None) -> None:
    monkeypatch.setattr("trainer.processes.devices.local_gpus", lambda *_: count)
    monkeypatch.setattr(local_ranks, "local_gpus", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_the_last_gpus_of_this_machine_are_the_servers(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (*SERVE, "rollout.serve.replicas=2", "rollout.serve.gpus=2", "cluster.workers=null")
    config = workshop.config("split", *given, "cluster.gpus_per_worker=null")
    gpus(monkeypatch, 8)
    assert count_ranks(config, config.rollout.serving_gpus) == 4
    assert [gpus_of_server(number, 2, visible_gpus()) for number in range(2)] == ["6,7", "4,5"]
    gpus(monkeypatch, 5, "GPU-a,GPU-b,GPU-c,GPU-d,GPU-e")
    assert [gpus_of_server(number, 2, visible_gpus()) for number in range(2)] == ["GPU-d,GPU-e", "GPU-b,GPU-c"]
    assert gpus_of_server(1, 0, visible_gpus()) == ""
    check_servers_here(config, 1)
    check_servers_here(override(config, "cluster.gpus_per_worker=0"), 2)  # ranks on CPUs leave all of them
    with pytest.raises(
        ConfigError, match=r"rollout.serve: 2 x 2 GPUs for servers and 2 for ranks are more than the 5 of"
    ):
        check_servers_here(config, 2)
    gpus(monkeypatch, 0)
    with pytest.raises(
        ConfigError, match=r"2 x 2 GPUs for servers and 0 for ranks are more than the 0 of .* \(0 serves on CPUs\)"
    ):
        check_servers_here(config, 2)
    with pytest.raises(ConfigError, match="rollout.serve.command: 'vllm' is not found on"):
        check_servers_here(override(config, "rollout.serve.command=[vllm, serve]"), 1)


def test_the_plan_has_the_gpus_of_both(workshop: Workshop) -> None:
    serve = "rollout.serve={replicas: 2, gpus: 4}"
    given = (*SERVERS, "rollout.engine=serve", serve, "cluster.workers=8", "cluster.gpus_per_worker=1", "train.steps=5")
    more = ("train.global_batch=24", "rollout.answers=3", "rollout.max_tokens=20", "sharding.sequence_parallel=2")
    config = workshop.config("p", *given, *more, "model.dtype=bf16")
    planned = plan_run(config, "H100", None)
    plan, estimate = planned.plan, planned.forecast
    (said,) = [note for note in plan.notes if "rollout: " in note]
    assert "each step samples 72 answers, 3 to each of 24 prompts, of at most 1,440 tokens" in said
    assert f"A step's are at most {decimal(12 * 72 * config.data.sequence_length)} in the store" in said
    assert estimate is not None
    assert "where the servers together sample as many tokens a second as the ranks learn from, here" in said
    assert f"as the ranks learn from, here {4 * estimate.tokens_per_second:,.0f}, and" in said, "four rows at a time"
    assert f"for a base of {decimal(2 * plan.parameters.frozen)} in bf16" in said
    assert f"After each update an adapter of {decimal(2 * plan.parameters.trainable)} is published." in said
    assert "by 2 servers that start with the run, with an adapter at most 1 updates old" in said
    assert "The ranks take 8 GPUs and the servers 8, 16 GPUs together; each server has 4 GPUs for a base of" in said


def test_a_plan_says_who_samples_and_how_fast_servers_have_to_be(workshop: Workshop) -> None:
    def said(*settings: str) -> str:
        given = ("train.steps=4", "train.global_batch=6", "rollout.answers=2", *settings)
        plan: Any = SimpleNamespace(device="cpu", parameters=SimpleNamespace(trainable=1000))
        return _of_rollouts(workshop.config("who", *SERVERS, *given), plan, None)

    own = said("rollout.engine=own")
    assert "rollout: each step samples 12 answers, 2 to each of 6 prompts" in own
    assert "by the ranks themselves, between updates. A step's" in own
    assert own.endswith("until its checkpoints are gone."), "nobody waits for an adapter"
    others = said("rollout.engine=[http://gpu-1:8000, http://gpu-2:8000]", "rollout.updates=2", "rollout.max_lag=3")
    assert "rollout: one step of 2 samples 12 answers" in others
    assert "by 2 servers, with an adapter at most 3 updates old" in others
    assert "together sample 1/2 as many tokens a second as the ranks learn from and rollout.max_lag is" in others
    assert others.endswith("at least 2.")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("rollout.serve.options=[--port=8000]", "rollout.serve.options: --port=8000 is not allowed, as Capstan chooses the address"),
        ("rollout.serve.command=[]", "rollout.serve.command: names no program"),
        ("rollout.engine=server", "rollout.engine"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_a_sentence(workshop: Workshop, setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        workshop.config("wrong", *SERVE, setting)


def test_servers_that_would_not_start_are_refused(workshop: Workshop) -> None:
    config: Config = workshop.config("idle", *SERVE, "rollout.engine=own")
    with pytest.raises(ConfigError, match="rollout.serve: has no effect without rollout.engine: serve"):
        resolve(config)


def test_a_run_that_asks_no_server_has_none(workshop: Workshop) -> None:
    own = workshop.config("first", *SERVERS, "rollout.engine=own")
    with sidecars_alive(sidecars_of(own), workshop.store.sub("first"), lambda _: pytest.fail("it was placed"), print):
        assert sidecars_of(own) == []
        assert sidecars_sentence(own) is None


def test_servers_on_this_machine_have_its_last_gpus_one_after_the_other(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = dict[str, dict[str, str]]()

    class Placed:
        def __init__(self, command: list[str], variables: dict[str, str]) -> None:
            placed[command[-2]] = variables

        def words(self) -> Iterator[str]:
            yield from ()

        def end(self) -> None: ...

    monkeypatch.setattr(sidecars, "Child", Placed)
    monkeypatch.setattr(sidecars, "visible_gpus", lambda: ["0", "1", "2", "3"])
    config = workshop.config("last", *SERVE, "rollout.serve.gpus=1", "rollout.serve.replicas=2")
    with sidecars_here(config, workshop.store.sub("last"), print):
        until(lambda: len(placed) == 3)
    devices = {name: variables["CUDA_VISIBLE_DEVICES"] for name, variables in placed.items()}
    assert devices == {"server-1": "3", "server-2": "2", "rollout": ""}
    assert sidecars_of(config, servers=False) == [Sidecar("rollout", 0, is_near=True)]


def test_on_ray_servers_have_bundles_of_gpus_and_the_asking_one_is_where_the_run_is_driven(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = dict[str, tuple[dict[str, Any], dict[str, str]]]()

    class Actor:
        words = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: iter(())))
        end = SimpleNamespace(remote=lambda: None)

    def options(**options: Any) -> Any:
        def remote(one: Sidecar, run: str, folder: str, variables: dict[str, str]) -> Any:
            placed[one.name] = options, variables
            return Actor()

        return SimpleNamespace(remote=remote)

    ray: Any = SimpleNamespace(
        remote=lambda _kind: SimpleNamespace(options=options),
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "node-1"),
    )
    strategies = SimpleNamespace(
        NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft),
        PlacementGroupSchedulingStrategy=lambda group, bundle: (group, bundle),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util", cast(Any, SimpleNamespace(scheduling_strategies=strategies)))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", cast(Any, strategies))
    errors: Any = SimpleNamespace(RayError=OSError, RayTaskError=OSError)
    monkeypatch.setitem(sys.modules, "ray.exceptions", errors)
    monkeypatch.setenv("OF_THE_DRIVER", "here")
    config = workshop.config("on-ray", *SERVE, "rollout.serve.gpus=2", "rollout.serve.replicas=2")
    with sidecars_on_ray(config, workshop.store.sub("on-ray"), "group", print):
        until(lambda: len(placed) == 3)
    assert {name: (given["num_gpus"], given["scheduling_strategy"]) for name, (given, _) in placed.items()} == {
        "server-1": (2, ("group", 0)),
        "server-2": (2, ("group", 1)),
        "rollout": (0, ("node-1", False)),
    }
    assert [name for name, (_, variables) in placed.items() if "OF_THE_DRIVER" in variables] == ["rollout"]
    on_cpus = override(config, "rollout.serve.gpus=0")
    with sidecars_on_ray(on_cpus, workshop.store.sub("on-ray"), None, print):
        until(lambda: placed["server-1"][0]["num_gpus"] == placed["server-2"][0]["num_gpus"] == 0)
    assert placed["server-1"][0]["scheduling_strategy"] == "DEFAULT"


def test_a_process_on_another_machine_begins_in_the_drivers_folder_where_it_is_there_too(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = list[Any]()
    monkeypatch.setattr(on_ray, "Child", lambda *given: begun.append(given))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    one: Any = SimpleNamespace(command=lambda run, address: [run, address])
    for folder in (str(workshop.folder), "/nowhere"):
        on_ray._Holder(one, "s3://runs/one", folder, {"A": "b"})
    command = ["s3://runs/one", "10.0.0.7"]
    assert begun == [(command, {"A": "b"}, str(workshop.folder)), (command, {"A": "b"}, None)]


@pytest.mark.parametrize(
    ("gpus", "of_rank", "can_grow", "waits", "said"),
    [
        (8, 1, False, 1.0, None),
        (4, 0, False, 1.0, None),  # the ranks are on CPUs
        (3, 0, False, 0.0, "the cluster has no room for 2 x 2 GPUs for servers and 0 for ranks"),
        (5, 1, False, 0.0, "the cluster has no room for 2 x 2 GPUs for servers and 2 for ranks"),
        (6, 1, False, 60.0, r"the cluster has no room after 60 seconds \(cluster.ray.start_timeout\) for 2 x 2"),
        (0, 1, True, 60.0, r"after 60 seconds"),  # more machines may come
    ],
)
def test_servers_wait_for_gpus_that_may_come(
    workshop: Workshop,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    of_rank: int,
    can_grow: bool,
    waits: float,
    said: str | None,
) -> None:
    clock, asked, removed, told = [0.0], list[Any](), list[Any](), list[str]()

    def wait(seconds: float) -> bool:
        if not said and clock[0] >= waits:
            return True
        clock[0] += seconds
        return False

    def placement_group(bundles: Any, strategy: str) -> Any:
        asked.append((bundles, strategy))
        return SimpleNamespace(wait=wait)

    ray: Any = SimpleNamespace(cluster_resources=lambda: {"GPU": float(gpus)})
    of_groups: Any = SimpleNamespace(placement_group=placement_group, remove_placement_group=removed.append)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util", of_groups)
    monkeypatch.setattr(on_ray, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    given = ("rollout.serve={gpus: 2, replicas: 2}", "cluster.workers=2", f"cluster.gpus_per_worker={of_rank}")
    config = workshop.config("room", *SERVERS, "rollout.engine=serve", *given, "cluster.ray.start_timeout=60")

    def enter() -> None:
        with on_ray.gpus_for_servers(config, can_grow=can_grow, log=told.append, stop=lambda: None) as group:
            assert group.wait is wait

    if said is None:
        enter()
    else:
        with pytest.raises(ConfigError, match=said):
            enter()
    assert clock[0] == pytest.approx(waits, abs=0.5)
    assert asked == [([{"GPU": 2.0}] * 2, "PACK")]
    assert [group.wait for group in removed] == [wait], "its GPUs are free for the next start"
    assert len(told) == (waits > 5), "it is said once"


def test_a_submission_says_that_there_will_be_one(workshop: Workshop) -> None:
    job = workshop.config("first", *SERVERS, "cluster.workers=2", "cluster.slurm.nodes=2")
    text = submit.render_batch_file(job, "s3://bucket/first", "abc", {})
    assert "\n# beside the ranks, where the run is driven: capstan rollout, which has http://gpu-1:8000 sample" in text
    assert "capstan rollout" not in submit.render_batch_file(
        override(job, "rollout.engine=own"), "s3://bucket/first", "abc", {}
    )
    serve = override(job, "rollout.engine=serve", "rollout.serve.replicas=2")
    assert (
        sidecars_sentence(serve)
        == "beside the ranks: 2 servers (vllm serve) on 1 GPU each, and capstan rollout, which has them sample; each"
        " ends with the run, and is started again when it dies"
    )
    alone = sidecars_sentence(override(serve, "rollout.serve.replicas=1", "rollout.serve.gpus=0"))
    assert alone is not None
    assert "1 server (vllm serve) on CPUs, and capstan rollout" in alone


def test_a_server_that_answers_is_told_once_where_it_is_asked(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Process:
        def poll(self) -> None: ...

    class Program:
        def keep(self) -> None: ...

    class Over:
        looks = 0

        def wait(self, seconds: float) -> bool:
            self.looks += 1
            return self.looks > 4

    run, told, puts = workshop.store.sub("told"), list[str](), list[str]()
    monkeypatch.setattr(sidecars, "is_healthy", lambda url: True)
    monkeypatch.setattr(run, "put", lambda key, content: puts.append(key))
    given: Any = (workshop.config("told"), run, "server-1", "http://127.0.0.1:1", Program(), Process(), Over())
    sidecars._watch(*given, told.append)  # pyright: ignore[reportCallIssue]
    assert puts == [layout.server("server-1")]
    assert [line.partition(",")[0] for line in told] == ["server-1 answers at http://127.0.0.1:1"]
