"""Temporary folders for one process, and the removal of those that killed processes have left.

A process locks its folder as long as it lives. The kernel drops the lock when the process ends, however it ends. A
process number could be mistaken for another's, even by a container that shares the directory; a lock cannot.

    python -m trainer.store.scratch DIRECTORY

removes such leftovers from a directory; slurm/run.sh runs it on each node.
"""

import fcntl
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# These names are those that `tempfile` makes from our prefixes. slurm/run.sh builds its own, from the job and its
# restart.
_OURS = re.compile(
    r"capstan-(?:(?:ray|submit|verify|base|adapter|export|gguf|push|start|profile|rollout|calibration)-[a-z0-9_]{8}|\d+-\d+)"
)
_YOUNG_SECONDS = 60.0
"""A folder this new may not be locked yet."""


@contextmanager
def scratch_folder(purpose: str, directory: str | None = None) -> Iterator[str]:
    """Make a folder in `directory`, or in the temporary directory, and remove it at the end.

    After a kill, the next process that makes a folder there removes it.
    """
    collect_leftovers(directory)
    with tempfile.TemporaryDirectory(prefix=f"capstan-{purpose}-", dir=directory, ignore_cleanup_errors=True) as folder:
        assert _OURS.fullmatch(Path(folder).name), f"{purpose} is not among the purposes that are collected"
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(held)


def collect_leftovers(directory: str | None = None) -> list[str]:
    """Remove what dead processes of this user have left in `directory`, or in the temporary one.

    Returns the removed paths.
    """
    with suppress(OSError):  # a failure here never stops a run from starting
        found = [
            Path(entry.path) for entry in os.scandir(directory or tempfile.gettempdir()) if _OURS.fullmatch(entry.name)
        ]
        return [str(path) for path in found if _is_old_and_ours(path) and _remove(path)]
    return []


def _is_old_and_ours(path: Path) -> bool:
    with suppress(OSError):
        facts = path.lstat()
        ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
        return ours and time.time() - facts.st_mtime > _YOUNG_SECONDS
    return False


def _remove(path: Path) -> bool:
    """Remove `path` unless a process holds its lock."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    except OSError:
        return False
    finally:
        os.close(held)
    return True


if __name__ == "__main__":
    collect_leftovers(sys.argv[1])
