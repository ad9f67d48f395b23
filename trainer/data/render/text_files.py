"""The files that decide how a run's texts become tokens: those of its tokenizer, and its chat template.

They belong to the run. A manifest has their hashes, and from the first start on the run's folder keeps each file under
its hash. The files beside the base, or that of `data.template`, may change later for other runs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainer.base.find.small_files import tokenizer_content
from trainer.config import Data
from trainer.data.render.chat_template import template_text
from trainer.errors import Damaged
from trainer.run import layout
from trainer.state.checkpoint.manifest import TextHashes
from trainer.store.store import Store, read_twice


@dataclass(frozen=True)
class RunText:
    """The contents of the base's tokenizer files by name, and the run's chat template.

    `template` is the text of `data.template`, or None for the tokenizer's own.
    """

    files: Mapping[str, bytes]
    template: str | None

    @cached_property
    def hashes(self) -> TextHashes:
        own = None if self.template is None else _sha256(self.template.encode())
        return TextHashes({name: _sha256(content) for name, content in self.files.items()}, own)


def run_text(data: Data, directory: Path) -> RunText:
    """The current files beside the base in `directory`, and that of `data.template`.

    Raises `ConfigError` if the template cannot be read.
    """
    return RunText(tokenizer_content(directory), template_text(data))


def keep_text(folder: Store, text: RunText) -> None:
    """Write those files that the run's folder does not have yet."""
    contents = [*text.files.values(), *([] if text.template is None else [text.template.encode()])]
    there = {entry.key for entry in folder.list(layout.TEXT)}
    for content in contents:
        if (key := layout.kept_text(_sha256(content))) not in there:
            folder.put(key, content)


def kept_text(folder: Store, hashes: TextHashes) -> RunText:
    """Read the files from the run's folder. Raises `NotFound` if it lacks one, `Damaged` if one has changed."""
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
