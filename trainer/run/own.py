"""Which configurations are this user's own.

Whoever may write to a store may write a config.yaml there, and that names files, programs and code. A bucket does not
tell who wrote an object, and on a shared folder everybody may be the same user of a container. So nothing in the store
says whose a run is. This user's own folder does: it keeps the SHA-256 of every configuration that they have started a
run with, or have said that they trust. A run that is moved or copied stays theirs, and one whose config.yaml somebody
has changed since does not.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from trainer.run import layout
from trainer.store.store import Store


def keep_as_own(text: bytes) -> None:
    """Note a configuration as this user's. Where their folder cannot be written, as in some containers, it is not."""
    with suppress(OSError, RuntimeError):
        _folder().mkdir(parents=True, exist_ok=True)
        _note(text).touch(mode=0o600)


def is_own(folder: Store) -> bool:
    """Whether this user has started a run with the config.yaml of `folder`, to the letter, or trusts it."""
    text = folder.get(layout.CONFIG)
    try:
        return _note(text).is_file()
    except (OSError, RuntimeError):  # this user has no home here
        return False


def _note(text: bytes) -> Path:
    return _folder() / hashlib.sha256(text).hexdigest()


def _folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "capstan" / "own"
