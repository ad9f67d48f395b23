"""The folder that an export fills, on a disk or in a bucket: what may be there before."""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from trainer.errors import ConfigError
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
