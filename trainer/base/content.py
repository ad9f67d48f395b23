"""The facts by which a base is known again, wherever it lies."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from trainer.base.base import Base
from trainer.base.locate import in_bucket

# huggingface_hub's cache: models--OWNER--NAME/snapshots/COMMIT has links to blobs/HASH, which of a large file is its SHA-256.
_SNAPSHOT = re.compile(r".*/models--[^/]+/snapshots/([^/]+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def content_of(base: Base) -> dict[str, Any]:
    """`weights` are the samples of each file. Where there are some, the `commit` of the Hub and its `hashes` of whole files are beside
    them, or a digest of the `versions` of a bucket's objects.

    Raises `ConfigError` where a file is damaged, `StorageError` where the store fails.
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
    """Name -> SHA-256 of each file of weights, as far as the Hub has told it; nothing is read."""
    if hub_commit(base.directory) is None:
        return {}
    named = {key: os.path.basename(os.path.realpath(base.directory / key)) for key in base.headers}
    return {key: name for key, name in named.items() if _SHA256.fullmatch(name)}
