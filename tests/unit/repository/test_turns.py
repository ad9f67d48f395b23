"""Where the time for long tests is short, those of a change come first, and those that do not come are named."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import turns

ROOT = Path(__file__).parents[3]
TESTS = sorted((ROOT / "tests/dist").glob("test_*.py"))


def test_a_change_brings_the_tests_forward_that_import_its_package() -> None:
    changed = frozenset({"trainer/export/write/merged.py"})
    order = sorted(TESTS, key=lambda test: turns.place(test, changed, "turn"))
    touched = [turns.touches(test, changed) for test in order]
    assert touched == sorted(touched, reverse=True)
    assert 0 < sum(touched) < len(touched)
    merge = ROOT / "tests/dist/test_merge.py"
    assert turns.touches(merge, changed)
    assert not turns.touches(merge, frozenset({"launcher/report/report.py", "docs/export.md"}))
    assert turns.touches(merge, frozenset({"tests/dist/test_merge.py"}))


def test_each_commit_has_another_turn() -> None:
    first, second = (sorted(TESTS, key=lambda test: turns.place(test, frozenset(), turn)) for turn in "ab")
    assert first != second
    assert first == sorted(reversed(TESTS), key=lambda test: turns.place(test, frozenset(), "a"))


@pytest.mark.parametrize(("left", "outcome"), [(60, "2 passed"), (-1, "2 skipped")])
def test_no_test_begins_behind_the_deadline_and_those_are_listed(tmp_path: Path, left: int, outcome: str) -> None:
    file = tmp_path / "test_two.py"
    file.write_text("def test_one(): pass\ndef test_other(): pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", tmp_path]
    done = subprocess.run(
        [*map(str, command), "-c", "/dev/null", f"--deadline={time.time() + left}", str(file)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert outcome in done.stdout
    assert ("test_two.py: 2" in done.stdout) == (left < 0)
