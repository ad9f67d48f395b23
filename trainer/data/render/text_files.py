"""The files that decide how a run's texts become tokens: those of its tokenizer, and its chat template.

They belong to the run: a manifest has their hashes, and the run's folder keeps each under its hash from the first start
on. What lies beside the base later, or under `data.template`, may have been changed for other runs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainer.base.find.small_files import tokenizer_content
from trainer.config import Data
from trainer.data.render.templates.template import template_text
from trainer.errors import Damaged
from trainer.run import layout
from trainer.state.checkpoint.manifest import TextHashes
from trainer.store.store import Store
from trainer.store.twice import read_twice


@dataclass(frozen=True)
class RunText:
    """Name -> content of the base's own files of the tokenizer; and the `template` of `data.template`, or None for the
    tokenizer's own.
    """

    files: Mapping[str, bytes]
    template: str | None

    @cached_property
    def hashes(self) -> TextHashes:
        own = None if self.template is None else _sha256(self.template.encode())
        return TextHashes({name: _sha256(content) for name, content in self.files.items()}, own)


def text_of(data: Data, directory: Path) -> RunText:
    """As it is now beside the base in `directory`, and under `data.template`. Raises `ConfigError` where that cannot be
    read.
    """
    return RunText(tokenizer_content(directory), template_text(data))


def keep_text(folder: Store, text: RunText) -> None:
    """Write what the run's folder has not yet."""
    contents = [*text.files.values(), *([] if text.template is None else [text.template.encode()])]
    there = {entry.key for entry in folder.list(layout.TEXT)}
    for content in contents:
        if (key := layout.kept_text(_sha256(content))) not in there:
            folder.put(key, content)


def kept_text(folder: Store, hashes: TextHashes) -> RunText:
    """Raises `NotFound` where the run's folder lacks some of it, `Damaged` where it has changed."""
    files = {name: _kept(folder, sha256) for name, sha256 in hashes.tokenizer.items()}
    return RunText(files, _kept(folder, hashes.template).decode() if hashes.template else None)


@read_twice
def _kept(folder: Store, sha256: str) -> bytes:
    content = folder.get(key := layout.kept_text(sha256))
    if _sha256(content) != sha256:
        raise Damaged(f"{folder.uri}/{key} is damaged: its content does not match its name.")
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
