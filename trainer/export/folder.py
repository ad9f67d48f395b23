"""The folder that an export fills, on a disk or in a bucket: what may be there before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from trainer.errors import CapstanError, ConfigError, StorageError
from trainer.store.store import Store

# It is told how many bytes are written, and how many there are in all.
BytesWritten = Callable[[int, int], None]

# The card is written first. These words in it tell that a half export is one of ours.
CARD = "README.md"
TRAINED = "trained with Capstan"


class DestinationTaken(ConfigError):
    """There is something already, which no export goes over."""


def check_destination(destination: Store, *ours: str) -> None:
    """Raises `DestinationTaken` unless it is empty, or holds only what a killed export has left: the card and files
    like `ours`.
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
    """Around an export: where it is refused midway, what it has written goes, if the destination was empty before. A
    store that fails leaves the half export, on which the next one goes on.
    """
    was_empty = not destination.list()
    try:
        yield
    except StorageError:
        raise
    except CapstanError:
        if was_empty:
            for entry in destination.list():
                destination.delete_alone(entry.key)
        raise


def holds_export(destination: Store, *ours: str) -> bool:
    """Whether an export to `destination` was finished: it then holds the file that is written last, which is neither
    the card nor like `ours`.
    """
    return any(not _like(entry.key, CARD, *ours) for entry in destination.list())


def local_folder(store: Store) -> Path | None:
    """The folder of a store on a disk; None for a bucket."""
    return Path(store.uri.removeprefix("file://")) if store.uri.startswith("file://") else None


def _like(name: str, *patterns: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
