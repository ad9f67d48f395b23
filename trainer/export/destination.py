"""The folder that an export fills, on a disk or in a bucket: what may be in it before, what is told while it is filled,
and what an export found out.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, NamedTuple

from trainer.errors import CapstanError, ConfigError, StorageError
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.store import Store

# This function is told how many bytes are written, and how many there are in all.
BytesWritten = Callable[[int, int], None]


# The card is written first. These words in it show that a half export is one of ours.
CARD = "README.md"


TRAINED = "trained with Capstan"


WHOLE_MODEL = "the whole model (its base was tuned, so an export and a merge are the same)"


class ExportProgress(NamedTuple):
    """Progress of an export.

    `written` is told the bytes done and the bytes in all, `say` a sentence on what begins now.
    """

    written: BytesWritten
    say: Callable[[str], None]


def print_bytes(done: int, total: int) -> None:
    """Print the bytes in a line that the launcher reads.

    There is one line for each piece of some MiB, which costs nothing compared with reading the piece.
    """
    print_line(f"progress {done} {total}")


def print_sentence(sentence: str) -> None:
    """Print a sentence in a line that the launcher reads and shows."""
    print_line(f"say {sentence}")


def print_line(line: str) -> None:
    """Print a line of which no other thread's line becomes a part: `print` writes its words and the end one by one."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Written:
    """An export that was written: its checkpoint, and what its format found out, as JSON and in sentences."""

    manifest: CheckpointManifest
    facts: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


class DestinationTaken(ConfigError):
    """The destination holds something already, and an export overwrites nothing."""


def check_destination(destination: Store, *ours: str) -> None:
    """Raise `DestinationTaken` unless the destination is empty or holds only the leftovers of a killed export.

    Leftovers are the card and files like `ours`.
    """
    taken = {entry.key for entry in destination.list()}
    if not taken:
        return
    known = all(_like(name, CARD, *ours) for name in taken)
    if not (known and CARD in taken and TRAINED.encode() in destination.get(CARD)):
        raise DestinationTaken(
            f"the destination {destination.uri} is not empty. Name a new folder; if it is an export of this run,"
            " --verify proves it."
        )


@contextmanager
def nothing_left_by_a_refusal(destination: Store) -> Iterator[None]:
    """Wrap an export: if it is refused midway, remove what it has written to an empty destination.

    If a store fails, the half export stays, and the next export continues it. That one removes the file which a killed
    export has half written, unless somebody writes to it now.
    """
    was_empty, before = not destination.list(), destination.half_written()
    try:
        yield
    except StorageError:
        raise
    except CapstanError:
        if was_empty:
            for entry in destination.list() + destination.half_written():
                destination.delete_alone(entry.key)
        raise
    for entry in destination.half_written():
        if entry in before:
            destination.delete(entry.key)


def holds_export(destination: Store, *ours: str) -> bool:
    """Return whether an export to `destination` was finished.

    A finished export holds the file that is written last, which is neither the card nor like `ours`.
    """
    return any(not _like(entry.key, CARD, *ours) for entry in destination.list())


def _like(name: str, *patterns: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
