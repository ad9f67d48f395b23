"""The copy of the user's code that a run keeps."""

import json
import subprocess
from pathlib import Path

import pytest

from launcher.start import snapshot
from trainer.errors import ConfigError


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "package").mkdir(parents=True)
    (root / "package" / "code.py").write_text("committed = 1\n")
    (root / ".gitignore").write_text("*.bin\n")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", *command], cwd=root, check=True, timeout=30)
    return root


def test_the_tracked_files_are_kept_as_they_are_with_their_git_state(checkout: Path, tmp_path: Path):
    (checkout / "package" / "code.py").write_text("changed = 2\n")
    (checkout / "untracked.py").write_text("")
    (checkout / "weights.bin").write_bytes(b"0" * 1000)
    code = snapshot.unpack(snapshot.take(checkout / "package").archive("run: {}\n"), tmp_path / "out")
    assert sorted(str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()) == [
        ".gitignore",
        "package/code.py",
    ]
    assert (code / "package" / "code.py").read_text() == "changed = 2\n"
    state = json.loads((tmp_path / "out" / "git.json").read_text())
    assert state["dirty"] is True
    assert len(state["commit"]) == 40
    assert "+changed = 2" in (tmp_path / "out" / "git.diff").read_text()
    assert (tmp_path / "out" / "config.yaml").read_text() == "run: {}\n"
    assert "\nray==" in (tmp_path / "out" / "requirements.txt").read_text()


def test_the_same_content_gives_the_same_bytes(checkout: Path):
    assert snapshot.take(checkout).archive("a: 1\n") == snapshot.take(checkout).archive("a: 1\n")


def test_outside_a_checkout_the_configuration_and_the_versions_are_kept(tmp_path: Path):
    taken = snapshot.take(tmp_path)
    assert (taken.git, taken.files) == (None, [])
    assert not snapshot.unpack(taken.archive("a: 1\n"), tmp_path / "out").exists()
    assert (tmp_path / "out" / "config.yaml").read_text() == "a: 1\n"


def test_tracked_data_that_is_too_large_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshot, "MOST_BYTES", 10)
    with pytest.raises(ConfigError, match=r"package/code.py .* Leave data out of git"):
        snapshot.take(checkout)
