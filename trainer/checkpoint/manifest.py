"""The checkpoint manifest: what a committed checkpoint consists of, and the proof that it is whole.

Format 2, JSON: {"format": 2, "sha256": <of the canonical JSON of body>, "body": {...}}. A checkpoint exists when its
manifest does. Readable without torch or DeepSpeed; docs/checkpoint-format.md describes every field.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from trainer.checkpoint.shard import Shard, verify_shard
from trainer.errors import Damaged, NotFound, NothingToResume, StorageError
from trainer.run import layout
from trainer.store import Store

FORMAT = 2


@dataclass(frozen=True)
class CheckpointManifest:
    """A committed checkpoint: the state after `step` updates."""

    step: int
    generation: int
    world_size: int
    created: float  # seconds since 1970
    updates: int  # AdamW's own step count
    position: dict[str, int]  # of the data: epoch, chapter, window, bin
    dataset: str  # fingerprint of the compiled training data
    order: dict[str, Any]  # what else the data's order depends on: version, seed, packing, weights, sequence length
    base: dict[str, Any]  # path and fingerprint of the base, and how it is quantized
    adapter: dict[str, Any]  # method, rank, alpha and targets
    groups: dict[str, dict[str, Any]]  # of the optimizer: name -> hyperparameters
    versions: dict[str, str]  # of the software that wrote it
    eval_loss: float | None  # nats a target token, where the step was evaluated
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


def parse_manifest(data: bytes, where: str) -> CheckpointManifest:
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
    return CheckpointManifest(**body, shards=shards)


def committed_steps(run: Store) -> list[int]:
    """Steps that have a manifest, newest first. Whether it is whole, `read_manifest` tells."""
    steps = (layout.manifest_step(entry.key) for entry in run.list(layout.CHECKPOINTS))
    return sorted((step for step in steps if step is not None), reverse=True)


def read_manifest(run: Store, step: int) -> CheckpointManifest:
    key = layout.manifest(step)
    return parse_manifest(run.get(key), f"{run.uri}/{key}")


def readable_manifests(run: Store, skipped: list[str], steps: list[int] | None = None) -> Iterator[CheckpointManifest]:
    """Committed checkpoints (of `steps`), newest first; the reason for every damaged one is added to `skipped`.

    Raises `StorageError` when the store cannot be read or a manifest is of an unknown format: neither is damage.
    """
    for step in committed_steps(run) if steps is None else steps:
        try:
            yield read_manifest(run, step)
        except (Damaged, NotFound) as error:
            skipped.append(str(error))


def problems_of(run: Store, manifest: CheckpointManifest) -> list[str]:
    """What is wrong with its shards; a store that fails raises `StorageError`."""
    return [problem for shard in manifest.shards if (problem := verify_shard(run, shard))]


def whole_checkpoint(run: Store, step: int | None = None) -> CheckpointManifest:
    """The checkpoint of `step`, or the newest whose shards all verify; damaged ones are passed over.

    Raises:
        NothingToResume: there is none, or none of that step.
        StorageError: there are, but not a whole one.
    """
    steps = committed_steps(run)
    if step is not None and step not in steps:
        committed = ", ".join(map(str, reversed(steps))) or "none"
        raise NothingToResume(f"{run.uri} has no committed checkpoint of step {step}. Committed are: {committed}.")
    skipped: list[str] = []
    for manifest in readable_manifests(run, skipped, steps if step is None else [step]):
        problems = problems_of(run, manifest)
        if not problems:
            return manifest
        skipped += problems
    if skipped:
        which = "no checkpoint" if step is None else f"the checkpoint of step {step}"
        raise StorageError(f"{which} of {run.uri} is {'' if step is None else 'not '}whole: {skipped[0]}")
    raise NothingToResume(f"{run.uri} has no committed checkpoint.")
