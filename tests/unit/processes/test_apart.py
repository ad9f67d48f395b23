"""A current folder that holds files with the names of libraries: nothing that Capstan starts imports them."""

import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

from trainer.processes import children

NAMES = ("json", "torch", "numpy", "trainer", "launcher", "pickle", "socket", "sitecustomize", "usercustomize")


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, whose modules leave a mark when somebody imports them."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r} + ' ')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def marks(folder: Path) -> str:
    return (folder / "imported").read_text() if (folder / "imported").exists() else ""


@pytest.mark.parametrize("command", [("-m", "trainer.store.scratch", "/nowhere"), ("-c", "import json, socket")])
def test_a_module_of_ours_takes_no_library_from_the_current_folder(hostile: Path, command: tuple[str, ...]) -> None:
    children.run([sys.executable, *command], check=True)
    with children.start([sys.executable, *command]) as process:
        assert process.wait(60) == 0
    subprocess.run(children.apart(["env", sys.executable, *command]), check=True)
    assert marks(hostile) == ""
    subprocess.run([sys.executable, *command], check=False, stderr=subprocess.DEVNULL)
    assert marks(hostile), "the folder would have been read"


def test_a_folder_that_a_command_is_given_counts_in_the_place_of_the_current_one(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    children.run([sys.executable, "-c", "import json"], check=True, cwd=hostile)
    assert marks(hostile) == ""


def test_what_multiprocessing_spawns_takes_none_either(hostile: Path) -> None:
    with children.spawned_apart():
        process = get_context("spawn").Process(target=os.getpid)
        process.start()
        process.join(60)
    assert process.exitcode == 0
    assert marks(hostile) == ""
    assert "PYTHONSAFEPATH" not in os.environ


def test_a_safe_path_that_somebody_has_asked_for_stays(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "yes")
    with children.spawned_apart():
        assert os.environ["PYTHONSAFEPATH"]
    assert os.environ["PYTHONSAFEPATH"] == "yes"


def test_a_checkout_that_is_not_installed_finds_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "launcher.cli"]
    monkeypatch.chdir(Path(__file__).parents[3])
    assert children.apart(command) == command
    assert children.apart(command, "/") == [sys.executable, "-P", "-m", "launcher.cli"]


def test_what_is_no_program_of_ours_stays_as_it_is(hostile: Path) -> None:
    for command in (["vllm", "serve"], [sys.executable, "server.py"], ["/other/python", "-m", "judge"]):
        assert children.apart(command) == command
