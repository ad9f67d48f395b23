"""Which long tests come first where there is no time for all: those of what has changed, then the others in turn.

`pytest -m long --deadline SECONDS` runs what begins before that Unix time. Test files that import a changed package, or
have changed themselves, begin first; each commit draws the order within both groups anew, so that after some commits
every file has come. What did not come is listed at the end of the output.
"""

import hashlib
import os
import re
import subprocess
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_TIME = "the time that these tests are given is over"


@cache
def _git(*arguments: str) -> tuple[str, ...]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return tuple(done.stdout.split()) if done.returncode == 0 else ()


def changed_files() -> frozenset[str]:
    """The files, relative to the root, that the last day's commits before HEAD have changed."""
    now = _git("log", "-1", "--format=%ct")
    if not now:
        return frozenset()
    before = _git("rev-list", "-1", f"--before={int(now[0]) - 24 * 3600}", "HEAD")
    return frozenset(_git("diff", "--name-only", before[0] if before else "HEAD~1", "HEAD"))


def packages(file: str) -> str:
    """trainer/data/order/order.py -> trainer/data"""
    return "/".join(file.split("/")[:2])


def touches(test: Path, changed: frozenset[str]) -> bool:
    """Whether the test file has changed, or a package that it imports."""
    if os.path.relpath(test, ROOT) in changed:
        return True
    imported = re.findall(r"\b((?:trainer|launcher)\.\w+)", test.read_text(encoding="utf-8"))
    return not {name.replace(".", "/") for name in imported}.isdisjoint(map(packages, changed))


def place(test: Path, changed: frozenset[str], turn: str) -> tuple[bool, str]:
    """The sort key of a test file: what a change touches first, and then as the commit `turn` draws it."""
    return not touches(test, changed), hashlib.sha256(f"{turn} {test.name}".encode()).hexdigest()


def in_turn(items: list[pytest.Item]) -> None:
    """Sort tests by their files, in place."""
    changed, turn = changed_files(), "".join(_git("rev-parse", "HEAD"))
    places = {path: place(path, changed, turn) for path in {item.path for item in items}}
    items.sort(key=lambda item: places[item.path])


def skip_when_over(deadline: float | None) -> None:
    """Skip the test that is about to begin where `deadline`, a Unix time in seconds, has passed."""
    if deadline is not None and time.time() > deadline:
        pytest.skip(NO_TIME)


def missed(reports: list[pytest.TestReport]) -> list[str]:
    """A line for each file that has tests which did not come, and how many."""
    files = Counter(report.nodeid.split("::")[0] for report in reports if NO_TIME in str(report.longrepr))
    return [f"{name}: {count}" for name, count in sorted(files.items())]
