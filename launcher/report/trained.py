"""The model and the data of a run, and how to train it again.

They are read from the run's settings, its newest checkpoint and its compiled data. A few documents are shown with
their pictures, as the model saw them. The data and the pictures may be gone when a report is made, and then the report
says why it does not show them.
"""

import io
import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import yaml

from launcher.report.history import History
from launcher.view.compiling import describe_left_out
from trainer.base.find.locate import base_files
from trainer.base.find.tokenizer import read_tokenizer
from trainer.config import Config
from trainer.config.reading import read_yaml
from trainer.config.row_kinds import ROW_KINDS
from trainer.config.secrets import masked
from trainer.data.dataset.manifest import read_manifest
from trainer.errors import NOT_JSON, CapstanError, ConfigError, NotFound, StorageError, first_line
from trainer.run import layout
from trainer.run.folder import name_of, run_config, store_of
from trainer.state.checkpoint.manifest import CheckpointManifest, readable_manifests
from trainer.store.store import Store

UNITS = {
    "targets": "target token",
    "pairs": "pair",
    "answers": "answer",
    "texts": "text",
    "words": "word",
    "decisions": "decision on a class",
}
"""The counts that steps have of what their loss is a mean over, and the word for one of them."""
_COUNTS = {
    "rows": "rows read",
    "bad_rows": "bad rows, left out",
    "dropped": "too long or too short, left out",
    "truncated": "too long, cut",
    "split": "too long, split",
    "without_targets": "nothing to train on",
    "desired": "desired answers",
    "untagged": "words that share a token with another tag",
}
_EXAMPLES = 5

Figures: TypeAlias = dict[str, Any]
"""A part of a report as `--json` prints it: plain values by their names."""


@dataclass(frozen=True)
class Settings:
    """The settings of the newest start as plain values, and the key that they were read from.

    A word replaces each secret.
    """

    tree: dict[str, Any]
    key: str | None

    def get(self, setting: str) -> Any:
        """Return the value of a dotted setting; None if it is not set."""
        value: Any = self.tree
        for name in setting.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class DataFigures:
    """A compiled data set. `counts` has what became of the rows, `remarks` examples of what is wrong with them."""

    split: str
    fingerprint: str
    documents: int
    tokens: int
    targets: int
    sources: list[Figures]
    counts: dict[str, int]
    remarks: list[str]


def read_settings(folder: Store, notes: list[str]) -> Settings:
    """Return the newest settings that can be read. The reasons why others could not go to `notes`."""
    keys = sorted((entry.key for entry in folder.list(layout.SETTINGS)), reverse=True)
    for key in [*keys, layout.CONFIG, layout.SUBMITTED]:
        try:
            tree = read_yaml(folder.get(key), key)
        except NotFound:
            continue
        except ConfigError as error:
            notes.append(f"{key} cannot be read: {error}")
            continue
        if isinstance(tree, dict):
            return Settings(masked(tree), key)
    notes.append("The run's settings cannot be read.")
    return Settings({}, None)


def newest_manifest(folder: Store, notes: list[str]) -> CheckpointManifest | None:
    """Return the manifest of the newest checkpoint that can be read. Damaged ones go to `notes`."""
    skipped: list[str] = []
    try:
        manifest = next(readable_manifests(folder, skipped), None)
    except StorageError as error:
        notes.append(str(error))
        manifest = None
    notes += skipped
    return manifest


def trained_figures(settings: Settings, manifest: CheckpointManifest | None, history: History) -> Figures:
    """Return the learning part of the model, and the base under it.

    `trainable` and `total` count parameters, and a loss is a mean over `loss_of`. The manifest is the truth about a
    checkpoint. The settings tell what it does not say, or everything if there is no manifest.
    """
    planned = history.newest("plan").get("parameters", {})
    base = manifest.base if manifest else {}
    adapter = dict(manifest.adapter) if manifest else {}
    if "start" in base:
        adapter["start"] = base["start"]
    stored = base.get("quant.type") or settings.get("quant.type")
    double = base.get("quant.double") if manifest else settings.get("quant.double")
    unit = next((unit for name, unit in UNITS.items() if name in history.steps.names), UNITS["targets"])
    return {
        "base": base.get("path") or settings.get("model.base"),
        "base_fingerprint": base.get("fingerprint"),
        "stored": stored and _stored(stored, double, settings),
        "method": adapter.pop("method", None) or settings.get("tuning.method"),
        "settings": adapter,
        "trainable": sum(map(math.prod, manifest.shapes.values())) if manifest else planned.get("trainable"),
        "total": planned.get("total"),
        "objective": (manifest.objective.get("name", "sft") if manifest else None) or settings.get("objective.name"),
        "optimizer": manifest.optimizer if manifest else settings.get("optim.name"),
        "sequence_length": settings.get("data.sequence_length"),
        "global_batch": settings.get("train.global_batch"),
        "loss_of": unit,
    }


def _stored(kind: str, double: Any, settings: Settings) -> str:
    if kind == "none":
        return str(settings.get("model.dtype") or "as it is stored")
    if kind == "stored":
        return "as its files have it"
    return f"{kind}, {'double' if double else 'single'} quantization"


def data_figures(
    folder: Store, settings: Settings, manifest: CheckpointManifest | None, history: History, notes: list[str]
) -> list[DataFigures]:
    """Return the data sets that the newest start has read, as far as the store still has them."""
    named = history.newest("start").get("data", {})
    fingerprints = {split: name for split, name in named.items() if isinstance(name, str)}
    if manifest:
        fingerprints.setdefault("train", manifest.dataset)
    root = store_of(folder)
    found = []
    for split, fingerprint in fingerprints.items():
        try:
            found.append(_data_set(root, settings, split, fingerprint))
        except StorageError as error:  # moved, pruned or damaged
            notes.append(f"The counts of the {split} data are not known: {error}")
    return found


def _data_set(root: Store, settings: Settings, split: str, fingerprint: str) -> DataFigures:
    compiled = read_manifest(root, fingerprint)
    given = settings.get(split if "." in split else f"data.{split}") or settings.get("data.train")
    listed = given if isinstance(given, list) else [given]
    paths = [str(source.get("path") or "") if isinstance(source, Mapping) else "" for source in listed]
    sources = [
        {
            "path": path or ", ".join(found.files[:1]),
            "documents": found.documents,
            "tokens": found.tokens,
            "targets": found.targets,
        }
        for path, found in zip([*paths, *[""] * len(compiled.sources)], compiled.sources, strict=False)
    ]
    counts = {_COUNTS.get(name, name.replace("_", " ")): n for name, n in compiled.counters if n is not None}
    remarks = [f"bad row: {text}" for text in compiled.bad_rows[:_EXAMPLES]]
    remarks += [f"left out by the chat template: {text}" for text in describe_left_out(compiled.left_out or {})]
    return DataFigures(
        split, fingerprint, compiled.documents, compiled.tokens, compiled.targets, sources, counts, remarks
    )


def repeat_figures(folder: Store, settings: Settings, manifest: CheckpointManifest | None) -> Figures | None:
    """Return how to do the same again: a command, and the configuration that it reads.

    None if no settings could be read.
    """
    if settings.key is None:
        return None
    return {
        "command": f"capstan train run.yaml run.name={name_of(folder)}-again",
        "config": yaml.safe_dump(settings.tree, sort_keys=False, allow_unicode=True),
        "versions": dict(manifest.versions) if manifest else _versions(folder),
        "snapshot": layout.SNAPSHOT if folder.exists(layout.SNAPSHOT) else None,
    }


def _versions(folder: Store) -> dict[str, str]:
    with suppress(NotFound, LookupError, TypeError, AttributeError, *NOT_JSON):
        return {
            str(name): str(version) for name, version in json.loads(folder.get(layout.ENVIRONMENT))["versions"].items()
        }
    return {}


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
            if digest in thumbnails or len(thumbnails) >= _PICTURES:
                continue
            if (picture := files.kept(entry).modality.preview(files.read(entry))) is not None:
                thumbnails[digest] = _thumbnail(picture)
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


def _thumbnail(small: Any) -> str:
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"
