"""No process outlives the one that needs it, however that one ends; and all are started in the one way that makes sure
of it.
"""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.processes import children, guard

ROOT = Path(__file__).parents[3]
# Each says beside its call why it does without.
WITHOUT = {"launcher/cluster/ray/jobs.py", "launcher/start/carried.py", "trainer/run/trackers/companion.py"}
# A family of four: a command that starts a command of its own, and a worker of multiprocessing that does.
FAMILY = """
import sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from trainer.processes import children

def grandchild():
    children.start(["sleep", "100"])
    time.sleep(100)

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), children.end_with_parent)
    pool.submit(grandchild)
    own = "from trainer.processes import children; children.run(['sleep', '100'])"
    children.start([sys.executable, "-c", own])
    print("begun", flush=True)
    time.sleep(100)
"""


def processes(mark: str) -> dict[int, str]:
    """The processes, with their commands, whose environment has this variable."""
    found = {}
    for number in guard.started_with(f"{mark}=1".encode()):
        with suppress(OSError):
            found[number] = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return {number: command for number, command in found.items() if command}  # a zombie has none


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_children_and_theirs_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    program, mark = tmp_path / "family.py", f"CAPSTAN_TEST_{os.getpid()}"
    program.write_text(FAMILY)
    environment = {**os.environ, mark: "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(program)], env=environment, stdout=subprocess.PIPE) as parent:
        assert wait_until(
            lambda: sum(command.split()[0].endswith("/sleep") for command in processes(mark).values()) == 2, 60
        )
        os.kill(parent.pid, signal.SIGKILL)
    assert wait_until(lambda: not processes(mark), 5), processes(mark)


def denied(path: Path) -> bytes:
    raise PermissionError(f"{path} is another user's")


@pytest.mark.parametrize(
    ("parent", "ends"),
    [
        (
            {"environ": b"HOME=/root\0", "maps": b"/usr/lib/systemd/libsystemd.so\n"},
            True,
        ),  # one that takes orphans over
        ({"environ": b"HOME=/root\0", "maps": b"/lib/torch/lib/libtorch_cpu.so\n"}, False),  # the agent
        (
            {"environ": b"TORCHELASTIC_RUN_ID=0\0", "maps": b"/usr/bin/bash\n"},
            False,
        ),  # a script between it and the rank
        ({}, False),  # outside of the container
        (None, True),  # another user's
    ],
)
def test_a_rank_whose_agent_was_killed_while_it_started_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parent: dict[str, bytes] | None, ends: bool
) -> None:
    for name, content in (parent or {}).items():
        (tmp_path / name).write_bytes(content)
    if parent is None:
        monkeypatch.setattr(Path, "read_bytes", denied)
    monkeypatch.setattr(children.guard, "tie", lambda: None)
    monkeypatch.setattr(children, "Path", lambda _: tmp_path)
    children.end_with_agent()  # without one nothing happens
    for name in ("TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(SystemExit) if ends else nullcontext():
        children.end_with_agent()


def test_a_command_whose_parent_has_ended_before_it_was_tied_does_not_begin() -> None:
    tie = [sys.executable, "-I", "-S", guard.__file__, "tie"]
    begun = [
        subprocess.run([*tie, str(parent), "echo", "begun"], stdout=subprocess.PIPE, check=False)
        for parent in (os.getpid(), os.getppid())
    ]
    assert [(one.returncode, one.stdout) for one in begun] == [(0, b"begun\n"), (1, b"")]


@pytest.mark.parametrize("ending", ["killed", "in order"])
def test_a_guard_ends_what_a_killed_process_left_and_nothing_else(ending: str) -> None:
    mark = f"CAPSTAN_TEST_{os.getpid()}"
    # The second has another environment, as one that has renamed itself, and is known by the first. So is one that is
    # started when the guard has looked already.
    script = f"env -i {mark}=1 sleep 20 & sleep 20"
    if ending == "killed":
        script = f"(sleep 1; env -i {mark}=1 sleep 20; true) & {script}"
    own = (
        f"import subprocess; subprocess.Popen(['sh', '-c', {script!r}], stdout=subprocess.DEVNULL,"
        " start_new_session=True)"
    )
    wait = "; print(flush=True); input()"
    program = f"from trainer.processes.children import guarded\nwith guarded():\n    {own}{wait}"
    environment = {**os.environ, mark: "1", "PYTHONPATH": str(ROOT)}
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe) as parent:
        assert parent.stdout
        parent.stdout.readline()
        if ending == "killed":
            parent.kill()
        else:
            parent.communicate(b"\n")
    if ending == "killed":
        assert wait_until(lambda: not processes(mark), 20)
    else:
        left = processes(mark)
        assert len(left) == 3
        for process in left:
            os.kill(process, signal.SIGKILL)


def test_a_stranger_with_the_number_of_one_that_has_ended_is_not_of_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_processes", lambda: {7: (1, "300"), 8: (1, "200")})
    assert guard._same({7: "100", 8: "200", 9: "100"}) == [8]


def test_a_process_is_known_by_all_of_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    started = {"7": b"A=1\0B=2\0C=3\0", "8": b"A=1\0B=20\0", "9": b"B=2\0"}
    monkeypatch.setattr(guard, "os", SimpleNamespace(listdir=lambda _: ["self", *started]))
    monkeypatch.setattr(guard, "open", lambda path, _: io.BytesIO(started[path.split("/")[2]]), raising=False)
    assert guard.started_with(b"A=1", b"B=2") == [7]
    assert guard.started_with(b"A=1") == [7, 8]


def test_what_begins_after_a_guarded_body_is_not_of_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_guard", lambda: nullcontext("a-mark"))
    monkeypatch.setattr(guard, "started_with", lambda mark: [7] if mark == b"CAPSTAN_FAMILY=a-mark" else [])
    monkeypatch.delenv("CAPSTAN_FAMILY", raising=False)
    with children.guarded() as started:
        assert os.environ["CAPSTAN_FAMILY"] == "a-mark"
        assert started() == [7]
    assert "CAPSTAN_FAMILY" not in os.environ


def test_a_process_that_has_ended_is_not_waited_for_while_its_parent_does_not_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = {"7": "7 (a) b) S 1", "8": "8 (ended) Z 7"}
    stats = {f"/proc/{name}/stat": f"{begin} {'0 ' * 17}300 0" for name, begin in states.items()}
    monkeypatch.setattr(guard, "os", SimpleNamespace(listdir=lambda _: ["7", "8", "self"]))
    monkeypatch.setattr(guard, "open", lambda path: io.StringIO(stats[path]), raising=False)
    assert guard._processes() == {7: (1, "300")}


def test_one_of_the_family_that_has_just_ended_keeps_no_other_from_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, int]]()

    def kill(process: int, number: int) -> None:
        if process == 7:
            raise ProcessLookupError
        asked.append((process, number))

    monkeypatch.setattr(guard, "os", SimpleNamespace(kill=kill))
    guard._signal([7, 8, 9], signal.SIGTERM)
    assert asked == [(8, signal.SIGTERM), (9, signal.SIGTERM)]


def test_who_joins_a_family_while_it_ends_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, now, killed = {7: (1, "70")}, [0.0], list[int]()

    def tell(processes: Iterable[int], number: int) -> None:
        if number == signal.SIGTERM:
            alive[8] = 1, "80"  # another process has adopted it
            return
        for process in [*processes]:
            killed.append(process)
            del alive[process]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(guard, "_signal", tell)
    monkeypatch.setattr(guard, "_processes", lambda: dict(alive))
    monkeypatch.setattr(guard, "started_with", lambda mark: list(alive))
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    guard.end(b"A=1", 7, patience=5.0)
    assert sorted(killed) == [7, 8]
    assert 5 < now[0] < 6, "they had so long to end by themselves"


def test_a_family_has_patience_while_its_head_lives_and_none_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = list[Any]()
    monkeypatch.setattr(guard, "end", lambda mark, *asked, patience: ended.append((mark, asked, patience)))
    monkeypatch.setattr(children, "_guard", lambda: nullcontext("a-mark"))
    with children.family(["sleep", "20"], 7.5) as lives:
        pass
    with children.family(["true"], 7.5) as over:
        over.wait(20)
    assert ended == [(b"CAPSTAN_FAMILY=a-mark", (lives.pid,), 7.5), (b"CAPSTAN_FAMILY=a-mark", (), 0)]
    assert lives.returncode == -signal.SIGKILL


def test_a_guard_is_of_no_family_and_hears_that_the_work_has_ended_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    told, environments = list[bytes](), list[dict[str, str]]()

    def begin(command: list[str], env: dict[str, str], **_: Any) -> Any:
        assert command[-1].startswith("CAPSTAN_FAMILY=")
        environments.append(env)
        return nullcontext(SimpleNamespace(communicate=told.append))

    monkeypatch.setattr(children, "subprocess", SimpleNamespace(Popen=begin, PIPE=subprocess.PIPE))
    monkeypatch.setenv("CAPSTAN_FAMILY", "another")
    with children._guard():
        assert told == []
    assert told == [b"over"]
    assert environments == [{name: value for name, value in os.environ.items() if name != "CAPSTAN_FAMILY"}]


def test_a_command_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-command: not found"):
        children.run(["no-such-command"])
    with pytest.raises(subprocess.CalledProcessError, match=r"Command '\['false'\]' returned"):
        children.run(["false"], check=True)


def test_every_process_of_the_product_is_started_that_way() -> None:
    own = re.compile(r"subprocess\.(?:run|Popen|call|check_\w+)\(|os\.(?:system|spawn\w+|posix_spawn\w*|popen)\(")
    files = [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "launcher").rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if own.search(path.read_text(encoding="utf-8"))}
    assert found - {"trainer/processes/children.py"} == WITHOUT


def test_a_family_is_asked_to_end_and_leaves_nobody_behind_even_if_its_head_has_ended(tmp_path: Path) -> None:
    said, mark = tmp_path / "said", f"CAPSTAN_TEST_{os.getpid()}"
    environment = {**os.environ, mark: "1"}
    asked = f"trap 'kill $!; sleep 0.3; echo asked > {said}; exit' TERM; sleep 20 & echo; wait"
    with children.family(["sh", "-c", asked], 20, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
    assert said.read_text() == "asked\n"
    assert not processes(mark)
    with children.family(["sh", "-c", "sleep 20 & exit"], 20, env=environment) as process:
        process.wait(20)
        assert len(processes(mark)) == 1
    assert not processes(mark)
