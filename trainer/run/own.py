"""This file knows which configurations are this user's own.

Whoever may write to a store may write a config.yaml there, and a config.yaml names files, programs and code. A bucket
does not tell who wrote an object, and on a shared folder everybody may be the same user of a container. So nothing in
the store says whose run it is. This user's own folder does: it keeps the SHA-256 of every configuration that the user
has started a run with, or has said that they trust. A run that is moved or copied stays the user's. A run whose
config.yaml somebody else has changed does not.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from trainer.run import layout
from trainer.store.store import Store


def keep_as_own(text: bytes) -> None:
    """Note a configuration as this user's.

    If the user's folder cannot be written, as in some containers, nothing is noted.
    """
    with suppress(OSError, RuntimeError):
        _folder().mkdir(parents=True, exist_ok=True)
        _note(text).touch(mode=0o600)


def is_own(folder: Store) -> bool:
    """Return whether this user has started a run with exactly the config.yaml of `folder`, or trusts it."""
    text = folder.get(layout.CONFIG)
    try:
        return _note(text).is_file()
    except (OSError, RuntimeError):  # this user has no home directory here
        return False


def _note(text: bytes) -> Path:
    return _folder() / hashlib.sha256(text).hexdigest()


def _folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "capstan" / "own"
