"""A few documents of a run's data with their pictures, as the model saw them: their text, and small pictures.

They are read from the compiled data and from where the pictures are. Any of this may be gone when a report is made, and
then the report says why it does not show them.
"""

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.report.trained import DataFigures
from trainer.base.find.locate import base_files
from trainer.base.find.tokenizer import read_tokenizer
from trainer.config import Config
from trainer.config.row_kinds import ROW_KINDS
from trainer.errors import CapstanError, first_line
from trainer.run import layout
from trainer.run.folder import run_config, store_of
from trainer.store.store import Store

_DOCUMENTS, _PICTURES, _LONGEST = 4, 12, 1500
_SIDE = 192
"""The longer side of a small picture, in pixels."""
_QUALITY = 80


@dataclass(frozen=True)
class SeenRows:
    """`documents` are of `trainer.data.look.show`. `thumbnails` has the address of a small picture by its SHA-256.

    `missing` says in a clause why there is nothing to show."""

    documents: Sequence[Any] = ()
    thumbnails: dict[str, str] | None = None
    missing: str | None = None


def read_seen(folder: Store, data: Sequence[DataFigures]) -> SeenRows | None:
    """Return documents of the run in `folder`, which was trained over `data`. None if its rows have no pictures."""
    try:
        config = run_config(folder)
        train = next((found.fingerprint for found in data if found.split == "train"), None)
        if not ROW_KINDS[config.data.kind].sees or train is None:
            return None
        return _read(store_of(folder), config, train)
    except (CapstanError, OSError, ImportError) as error:
        return SeenRows(missing=first_line(error).rstrip("."))


def _read(store: Store, config: Config, fingerprint: str) -> SeenRows:
    from trainer.data.dataset.dataset import open_chapter  # numpy and Pillow, which no other report needs
    from trainer.data.dataset.pictures import PictureFiles
    from trainer.data.look.show import Decoding, documents_with_pictures

    tokenizer = read_tokenizer(base_files(config.model), config.model.base, config.model.tokens)
    files = PictureFiles(store.sub(layout.dataset(fingerprint)))
    documents, thumbnails = list[Any](), dict[str, str]()
    decoding, dataset = Decoding(tokenizer, config.data.labels), open_chapter(store, fingerprint, 0)
    for document, entries in documents_with_pictures(dataset, decoding, _DOCUMENTS):
        for entry in entries:
            digest = entry["sha256"].tobytes().hex()
            if digest not in thumbnails and len(thumbnails) < _PICTURES:
                thumbnails[digest] = _thumbnail(files.read(entry))
        documents.append(replace(document, pieces=_cut(document.pieces)))
    return SeenRows(documents, thumbnails)


def _cut(pieces: Sequence[Any]) -> list[Any]:
    """Leave out the end of a long document."""
    left, kept = _LONGEST, list[Any]()
    for piece in pieces:
        if left <= 0:
            kept.append(replace(piece, text=" […]", trained=False, special=False, picture=None))
            break
        kept.append(replace(piece, text=piece.text[:left]))
        left -= len(piece.text)
    return kept


def _thumbnail(content: bytes) -> str:
    from trainer.data.format.known.pictures.sources import decoded

    small = decoded(content)
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"
