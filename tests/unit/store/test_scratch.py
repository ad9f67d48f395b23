"""A killed process leaves its folders in /tmp; the next start removes them, and nothing that is somebody's."""

import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.store import scratch
from trainer.store.scratch import collect_leftovers, scratch_folder

REPOSITORY = Path(__file__).resolve().parents[3]
YOUNG = scratch._YOUNG_SECONDS
HOLD = """
import sys
from trainer.store.scratch import scratch_folder
with scratch_folder("ray") as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_YOUNG_SECONDS", -1.0)
    return tmp_path


@pytest.fixture
def holder(temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with a folder of its own."""
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_the_folder_of_a_process_is_kept_while_it_lives_and_collected_after_a_kill(
    holder: subprocess.Popen[str],
) -> None:
    assert holder.stdout is not None
    folder = holder.stdout.readline().strip()
    Path(folder, "something").write_text("left")
    assert collect_leftovers() == []
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=300)
    assert Path(folder).exists()
    assert collect_leftovers() == [folder]
    assert not Path(folder).exists()


def test_the_folder_of_a_slurm_job_is_collected_once_its_ray_is_gone(temporary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "local" / "capstan-4711-0"
    (folder / "ray").mkdir(parents=True)
    (folder / "token").write_text("hidden")
    assert collect_leftovers() == [], "it is in a folder of its own"
    lock = ["bash", "-c", 'exec 9<"$0" && flock 9 && echo held && exec sleep 60', folder]  # as slurm/run.sh does
    with subprocess.Popen(lock, stdout=subprocess.PIPE, text=True) as ray:
        assert ray.stdout is not None
        assert ray.stdout.readline() == "held\n"
        assert collect_leftovers(str(folder.parent)) == []
        ray.kill()
    assert collect_leftovers(str(folder.parent)) == [str(folder)]
    assert not folder.exists()


def test_what_is_not_ours_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("capstan-ray-mine", "capstan-other-abcd1234", "ray-abcd1234", "capstan-ray-abcd1234.bak"):
        (temporary / name).mkdir()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (temporary / "capstan-ray-abcd1234").symlink_to(elsewhere)
    assert collect_leftovers() == []
    assert not scratch._remove(temporary / "capstan-ray-abcd1234"), "no link is followed"
    (temporary / "capstan-ray-efgh5678").mkdir()
    with monkeypatch.context() as somebody:
        somebody.setattr(os, "getuid", lambda: 12345)
        assert collect_leftovers() == []
    monkeypatch.setattr(scratch, "_YOUNG_SECONDS", YOUNG)
    assert collect_leftovers() == []


def test_the_folders_of_all_that_make_some_are_collected(temporary: Path) -> None:
    made = re.compile(r'scratch_folder\(\s*"([^"]*)"')
    sources = (path for room in ("trainer", "launcher") for path in (REPOSITORY / room).rglob("*.py"))
    purposes = {purpose for path in sources for purpose in made.findall(path.read_text(encoding="utf-8"))}
    assert len(purposes) > 9
    for purpose in purposes:
        (temporary / f"capstan-{purpose}-abcd1234").mkdir()
    collect_leftovers()
    assert list(temporary.iterdir()) == []


def test_a_folder_is_removed_at_its_end() -> None:
    with scratch_folder("verify") as folder:
        assert collect_leftovers() == []
        assert Path(folder).is_dir()
    assert not Path(folder).exists()


def test_a_folder_that_cannot_be_removed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **_options: object) -> None:
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patched, scratch_folder("verify") as folder:
        patched.setattr(os, "rmdir", refuses)
    assert collect_leftovers() == [folder], "whoever comes next removes it"


def test_whoever_makes_a_folder_removes_what_a_killed_process_left(temporary: Path) -> None:
    left, elsewhere = temporary / "capstan-push-abcd1234", temporary / "other/capstan-gguf-abcd1234"
    for folder in (left, elsewhere):
        (folder / "export").mkdir(parents=True)
    with scratch_folder("push"):
        assert not left.exists()
    with scratch_folder("gguf", str(elsewhere.parent)):
        assert not elsewhere.exists()


def test_a_job_removes_what_others_left_on_its_node(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """slurm/run.sh runs the module itself."""
    left = temporary / "node" / "capstan-4711-0"
    left.mkdir(parents=True)
    young = temporary / "node" / "capstan-4711-1"
    young.mkdir()
    os.utime(left, (0, 0))
    monkeypatch.setattr(sys, "argv", ["scratch", str(left.parent)])
    monkeypatch.delitem(sys.modules, "trainer.store.scratch")
    runpy.run_module("trainer.store.scratch", run_name="__main__")
    assert [path.name for path in left.parent.iterdir()] == [young.name], "it may not have its lock yet"
