"""The facts that identify a base, wherever it lies."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.base.base import Base
from trainer.base.find.locate import in_bucket
from trainer.base.weight_samples import hash_whole
from trainer.errors import ConfigError, Damaged, NotFound
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store, read_json

# In huggingface_hub's cache, models--OWNER--NAME/snapshots/COMMIT has links to blobs/HASH. The hash of a large file is
# its SHA-256.
_SNAPSHOT = re.compile(r".*/models--[^/]+/snapshots/([^/]+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def content_of(base: Base) -> dict[str, Any]:
    """The facts that identify the base: `weights` has the samples of each file.

    If they are known, it also has the `commit` of the Hub and its `hashes` of whole files, or a digest of the
    `versions` of a bucket's objects. Raises `ConfigError` if a file is damaged, `StorageError` if the store fails.
    """
    facts = {
        "weights": base.samples,
        "commit": hub_commit(base.directory),
        "hashes": hub_hashes(base),
        "versions": hashlib.sha256(json.dumps(base.versions).encode()).hexdigest()[:16]
        if in_bucket(base.name)
        else None,
    }
    return {name: value for name, value in facts.items() if value}


def hub_commit(directory: Path) -> str | None:
    """The commit of a base in huggingface_hub's cache; None anywhere else."""
    found = _SNAPSHOT.fullmatch(str(directory))
    return found[1] if found else None


def hub_hashes(base: Base) -> dict[str, str]:
    """Name -> SHA-256, for each file of weights whose hash the Hub has given. Reads no file."""
    if hub_commit(base.directory) is None:
        return {}
    named = {key: os.path.basename(os.path.realpath(base.directory / key)) for key in base.headers}
    return {key: name for key, name in named.items() if _SHA256.fullmatch(name)}


def check_whole(base: Base, folder: Store, report: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Read every byte of the base's files, and compare their hashes with the Hub's.

    If the Hub gave none, compare with those that the first call kept in the run's folder. A run has one base from its
    first commit on. Returns in words what the files equal. `report` gets the bytes done and all bytes. Raises
    `ConfigError` if a file differs.
    """
    found, known = hash_whole(base.store, base.headers, report), hub_hashes(base)
    committed = bool(committed_steps(folder))
    known = {**(_kept(folder) if committed else {}), **known}
    for file, sha256 in found.items():
        if known.get(file, sha256) != sha256:
            raise ConfigError(
                f"model.base: {base.name} is not what it was: {file} has the SHA-256 {sha256} instead of {known[file]}."
                " Copy that file again."
            )
    if committed:
        folder.put(layout.BASE_HASHES, json.dumps(found, indent=1).encode())
    if known.keys() >= found.keys():
        return "every byte is as on the Hub" if hub_hashes(base) else "every byte is as when it was first read whole"
    return (
        "every byte was read for the first time, and is compared with that from now on"
        if committed
        else "every byte was read"
    )


def _kept(folder: Store) -> dict[str, str]:
    with suppress(NotFound, Damaged):
        kept = read_json(folder, layout.BASE_HASHES)
        return kept if isinstance(kept, dict) else {}
    return {}
