"""No command is silent for more than three seconds: whatever takes long is said, with the time so far."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.material import SEQUENCE, make_base, make_pairs
from tests.pages import ROOT
from trainer.processes import helper_thread
from trainer.processes.helper_thread import never_silent, now_doing, patiently, waiting_for_a_person

ALLOWED = 3.0
STARVED = 4.0  # seconds that a busy machine may keep a process from running


class Line(NamedTuple):
    """A line of a command, and the seconds of silence before it."""

    text: str
    silence: float


def lines_of(arguments: list[str], folder: Path, before: str = "") -> list[Line]:
    """The lines that `capstan` prints in `folder`, whose process first runs the code `before`."""
    program = f"{before}\nfrom launcher.cli.__main__ import main\nmain()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    found, last = list[Line](), time.monotonic()
    for text in process.stdout:
        now = time.monotonic()
        found.append(Line(text.rstrip(), now - last))
        last = now
    assert process.wait() == 0, found
    return found


SLOWED = """
import sys, threading
import launcher.doctor.doctor as doctor
plain = doctor.ask_torch
def slow():
    threading.Event().wait(9)
    return {"gpus": [], "build": None, "kernels": [], "packages": [], "wheel": None, "bf16": False}
doctor.ask_torch = slow
"""


def test_a_command_that_is_slow_says_so_every_three_seconds(tmp_path: Path) -> None:
    lines = lines_of(["doctor"], tmp_path, SLOWED)
    told = [line for line in lines if line.text.startswith("doctor: ")]
    assert len(told) >= 2, lines
    assert told[0].text.endswith("s so far")
    assert max(line.silence for line in lines[1:]) < ALLOWED + STARVED
    assert "bf16" in " ".join(line.text for line in lines)


@pytest.mark.parametrize(("closed", "wanted"), [("2>&-", True), (">&-", False), ("<&- >&- 2>&-", False)])
def test_a_stream_that_the_shell_has_closed_is_nobodys(closed: str, wanted: bool) -> None:
    command = f'exec "$0" -m launcher.cli recipe smollm2-135m-chat -o never.yaml --dry-run --json {closed}'
    ended = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stderr.splitlines() if not line.endswith(" s so far")] == []
    assert [json.loads(line)["recipe"] for line in ended.stdout.splitlines()] == ["smollm2-135m-chat"] * wanted
    mistake = subprocess.run(
        ["sh", "-c", f'exec "$0" -m launcher.cli recipe none --json {closed}', sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (mistake.returncode, mistake.stdout) == (2, "")


def told_within(seconds: float, capfd: pytest.CaptureFixture[str]) -> list[str]:
    threading.Event().wait(seconds)
    return capfd.readouterr().err.splitlines()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper_thread, "_NEXT_SECONDS", 0.1)
    monkeypatch.setattr(helper_thread, "_LOOK_SECONDS", 0.01)


def test_what_it_does_is_said_and_its_own_lines_count(soon: None, capfd: pytest.CaptureFixture[str]) -> None:
    with never_silent("train"):
        assert told_within(0.5, capfd)[0] == "train: 0 s so far"
        with patiently("asking the store"):
            assert "asking the store: 0 s so far" in told_within(0.5, capfd)
            now_doing("step 6")
            assert told_within(0.3, capfd)[-1].startswith("asking the store: ")
        assert told_within(0.3, capfd)[-1].startswith("step 6: ")
        now_doing("step 7")
        assert told_within(0.5, capfd)[-1] == "step 7: 0 s so far"
        for _ in range(20):
            print("a line of its own", file=sys.stderr)
            threading.Event().wait(0.02)
        assert len([line for line in told_within(0, capfd) if "so far" in line]) <= 2
    assert told_within(0.3, capfd) == []


class Full(io.StringIO):
    """A file on a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_work_goes_on_though_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, Full()):
        monkeypatch.setattr(sys, "stderr", stream)
        helper_thread._to_stderr("reading: 2 s so far")


class Paused(io.StringIO):
    """A pipe to a pager that shows its first page."""

    def write(self, text: str) -> int:
        threading.Event().wait(0.5)
        return super().write(text)


def test_nothing_is_said_while_a_pager_takes_no_more(
    soon: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Paused())
    with never_silent("data show"):
        sys.stdout.write("a long table")
    assert capfd.readouterr().err == ""


def test_nothing_is_said_while_a_person_types_and_less_often_the_older_it_is(
    soon: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with never_silent("init"), waiting_for_a_person():
        told_within(0.05, capfd)
        assert told_within(0.4, capfd) == []
    with never_silent("init"):
        with waiting_for_a_person():
            told_within(0.15, capfd)
        assert told_within(0.05, capfd) == [], "the pause begins anew"
        assert told_within(0.2, capfd)[0].startswith("init: ")
    monkeypatch.setattr(helper_thread, "_GROWTH", 0.01)  # as if it had run for days
    with never_silent("train"):
        told_within(0.05, capfd)
        assert told_within(0.5, capfd) == []


FIRST_HOUR = (
    ["doctor"],
    ["recipe"],
    ["recipe", "smollm2-135m-chat", "-o", "sailing.yaml", "--data", "sample"],
    ["init", "first.yaml", "--base", "BASE", "--data", "pairs.jsonl", "--goal", "dpo"],
    ["plan", "run.yaml"],
    ["data", "show", "run.yaml"],
    ["train", "run.yaml"],
    ["export", "quiet", "adapter", "--store", "store", "--verify"],
)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_command_of_the_first_hour_is_silent(tmp_path: Path) -> None:
    """A DPO run has its reference pass before the first step. Nothing waits for the clock: lines are timed as they come."""
    make_base(tmp_path / "base")
    make_pairs(tmp_path / "pairs.jsonl")
    tree = {
        "run": {"name": "quiet", "store": str(tmp_path / "store")},
        "model": {"base": str(tmp_path / "base")},
        "quant": {"type": "none"},
        "objective": {"name": "dpo", "reference": "stored"},
        "data": {"train": [{"path": str(tmp_path / "pairs.jsonl")}], "sequence_length": SEQUENCE},
        "optim": {"lr": 1e-3},
        "train": {"steps": 2, "global_batch": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    silences = dict[str, float]()
    for command in FIRST_HOUR:
        lines = lines_of([word.replace("BASE", str(tmp_path / "base")) for word in command], tmp_path)
        silences[" ".join(command)] = max((line.silence for line in lines), default=0.0)
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert max(silences.values()) < ALLOWED + STARVED * busy, silences
