"""The checkpoint manifest: what a committed checkpoint consists of, and the proof that it is whole.

Format 1, JSON: {"format": 1, "sha256": <of the canonical JSON of body>, "body": {...}}. A checkpoint exists when its
manifest does. Readable without torch or DeepSpeed; docs/checkpoint-format.md describes every field.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from trainer import run_layout
from trainer.errors import Damaged, NotFound, NothingToResume, StorageError
from trainer.store import Store

FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """What one rank wrote. `intervals`: parameter name -> [begin, end) of its flattened elements in this shard."""

    key: str
    size: int
    sha256: str
    intervals: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint: the state after `step` updates."""

    step: int
    generation: int
    world_size: int
    created: float  # seconds since 1970
    updates: int  # AdamW's own step count
    position: dict[str, int]  # of the data: epoch and next bin
    dataset: str  # fingerprint of the compiled training data
    order: dict[str, Any]  # what else the data's order depends on: seed, packing, weights, sequence length
    base: dict[str, Any]  # path and fingerprint of the base, and how it is quantized
    adapter: dict[str, Any]  # method, rank, alpha and targets
    shapes: dict[str, list[int]]  # of every trainable parameter
    shards: list[Shard]

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    def to_json(self) -> bytes:
        body = asdict(self)
        return json.dumps({"format": FORMAT, "sha256": _digest(body), "body": body}, sort_keys=True).encode()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Raises `Damaged` unless `data` is a whole manifest, and `StorageError` when it is of another format."""
    try:
        tree = json.loads(data)
        known, body, digest = tree["format"] == FORMAT, tree["body"], tree["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{where} is damaged: it is not a manifest.") from error
    if not known:
        raise StorageError(
            f"{where} is of format {tree['format']}; this version reads format {FORMAT}. Use the version that wrote it."
        )
    if digest != _digest(body):
        raise Damaged(f"{where} is damaged: its content does not match its sha256.")
    shards = [
        Shard(s["key"], s["size"], s["sha256"], {name: (begin, end) for name, (begin, end) in s["intervals"].items()})
        for s in body.pop("shards")
    ]
    return Manifest(**body, shards=shards)


def committed_steps(run: Store) -> list[int]:
    """Steps that have a manifest, newest first. Whether it is whole, `read_manifest` tells."""
    steps = (run_layout.manifest_step(entry.key) for entry in run.list(run_layout.CHECKPOINTS))
    return sorted((step for step in steps if step is not None), reverse=True)


def read_manifest(run: Store, step: int) -> Manifest:
    key = run_layout.manifest(step)
    return parse_manifest(run.get(key), f"{run.uri}/{key}")


def readable_manifests(run: Store, skipped: list[str]) -> Iterator[Manifest]:
    """Committed checkpoints, newest first; the reason for every damaged one is added to `skipped`.

    Raises `StorageError` when the store cannot be read or a manifest is of an unknown format: neither is damage.
    """
    for step in committed_steps(run):
        try:
            yield read_manifest(run, step)
        except (Damaged, NotFound) as error:
            skipped.append(str(error))


def verify_shard(run: Store, shard: Shard) -> str | None:
    """None when the shard's bytes are what was written, else what is wrong; a store that fails raises `StorageError`."""
    try:
        data = run.get(shard.key)
    except NotFound as error:
        return str(error)
    if len(data) != shard.size:
        return f"{run.uri}/{shard.key} has {len(data)} bytes instead of {shard.size}."
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return f"{run.uri}/{shard.key} does not match its sha256."
    return None


def newest_whole(run: Store) -> Manifest:
    """The newest checkpoint whose shards all verify; damaged ones are passed over."""
    skipped: list[str] = []
    for manifest in readable_manifests(run, skipped):
        problems = [problem for shard in manifest.shards if (problem := verify_shard(run, shard))]
        if not problems:
            return manifest
        skipped += problems
    if skipped:
        raise StorageError(f"no checkpoint of {run.uri} is whole: {skipped[0]}")
    raise NothingToResume(f"{run.uri} has no committed checkpoint.")


def prunable(steps: list[int], keep_last: int, keep_every: int) -> list[int]:
    """Which of the committed `steps` (newest first) retention removes."""
    return [step for step in steps[keep_last:] if not (keep_every and step % keep_every == 0)]


def prune(run: Store, steps: list[int]) -> None:
    """Remove checkpoints: the manifest first, so that none is ever chosen half gone."""
    for step in steps:
        run.delete(run_layout.manifest(step))
        for entry in run.list(run_layout.checkpoint(step)):
            run.delete(entry.key)
