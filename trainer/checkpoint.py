"""Training state to the store and back, at any world size.

Save: each rank copies its intervals of what learns (one device-to-host copy, the loop's only wait), then writes them in
the background. The loop calls `advance` at every step border; once all ranks' shards are up, rank 0 writes the manifest
with a create-only PUT: the commit. Restore: newest manifest first; every shard is hashed once across the ranks; where
one is damaged, all ranks fall back together; each rank reads the byte ranges that overlap its intervals.
"""

import hashlib
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from trainer import run_layout
from trainer.engine import STATES, Engine, TrainablePartition
from trainer.errors import ConfigError, NothingToResume, StorageError, Superseded
from trainer.manifest import Manifest, Shard, committed_steps, prunable, prune, readable_manifests, verify_shard
from trainer.ranks import Ranks
from trainer.safetensors_index import TensorSource, read_header
from trainer.store import Store


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to: a restore refuses another base, adapter, data set or order of it."""

    dataset: str
    base: dict[str, Any]
    adapter: dict[str, Any]
    order: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Pending:
    """A save under way. `shard` is this rank's upload; `commit` builds the manifest from all ranks' shards."""

    step: int
    started: float
    shard: Future[Shard]
    commit: Callable[[list[Shard]], Manifest]


@dataclass
class Checkpoints:
    """One run's checkpoints, as one rank of one generation writes them."""

    run: Store
    ranks: Ranks
    generation: int
    identity: Identity
    keep_last: int
    keep_every: int
    _pending: _Pending | None = None
    _background: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    def save(self, engine: Engine, step: int, position: dict[str, int]) -> None:
        """Begin to save the state after `step` updates. Collective; waits for the save before, if that is not done."""
        self.finish()
        partitions = engine.partitions()
        tensors = {
            f"{part.name}|{key}": state.detach().to("cpu", copy=True)
            for part in partitions
            if part.end > part.begin
            for key, state in part.states.items()
        }
        intervals = {part.name: (part.begin, part.end) for part in partitions if part.end > part.begin}
        attempt = self.ranks.broadcast(uuid.uuid4().hex[:8])
        key = run_layout.shard(step, attempt, self.ranks.rank)
        updates = engine.updates
        shapes = {part.name: list(part.shape) for part in partitions}

        def commit(shards: list[Shard]) -> Manifest:
            return Manifest(
                step=step,
                generation=self.generation,
                world_size=self.ranks.world_size,
                created=time.time(),
                updates=updates,
                position=position,
                dataset=self.identity.dataset,
                order=self.identity.order,
                base=self.identity.base,
                adapter=self.identity.adapter,
                shapes=shapes,
                shards=shards,
            )

        upload = self._background.submit(_write_shard, self.run, key, tensors, intervals)
        self._pending = _Pending(step, time.monotonic(), upload, commit)

    @property
    def uploaded(self) -> bool:
        """Whether this rank has nothing left to upload."""
        return self._pending is None or self._pending.shard.done()

    def advance(self, all_uploaded: bool) -> dict[str, Any] | None:
        """Commit the save under way once every rank has uploaded. Collective when it has; returns what was committed.

        Raises:
            StorageError: an upload failed; `Superseded` when a later generation has taken over the run.
        """
        if self._pending is None or not all_uploaded:
            return None
        pending, self._pending = self._pending, None
        # What failed on one rank fails on all: a rank that raised alone would leave the others in their next collective.
        error = pending.shard.exception()
        outcomes = self.ranks.gather_objects(str(error) if error else pending.shard.result())
        for rank, outcome in enumerate(outcomes):
            if not isinstance(outcome, Shard):
                raise StorageError(f"rank {rank} could not upload its checkpoint of step {pending.step}: {outcome}")
        manifest = pending.commit(outcomes)
        problem: StorageError | None = self.ranks.broadcast(self._commit(manifest) if self.ranks.rank == 0 else None)
        if problem:
            raise problem
        return {
            "step": manifest.step,
            "bytes": manifest.size,
            "seconds": round(time.monotonic() - pending.started, 3),
            "key": run_layout.manifest(manifest.step),
        }

    def finish(self) -> dict[str, Any] | None:
        """Wait for the save under way and commit it. Collective."""
        if self._pending is not None:
            self._pending.shard.exception()  # waits; advance() raises it
        return self.advance(all_uploaded=True)

    def _commit(self, manifest: Manifest) -> StorageError | None:
        """Write the manifest, unless a later generation has taken over; None, or why it was not written."""
        try:
            starts = (run_layout.generation_of(entry.key) or 0 for entry in self.run.list(run_layout.METRICS))
            newest = max(starts, default=0)
            if newest > self.generation:
                return Superseded(
                    f"{self.run.uri}: generation {newest} of this run has started; generation {self.generation} must not "
                    "commit any more. Two jobs of one run are alive: end one."
                )
            self.run.create(run_layout.manifest(manifest.step), manifest.to_json())
        except StorageError as error:
            return error
        self._background.submit(self._prune)
        return None

    def _prune(self) -> None:
        prune(self.run, prunable(committed_steps(self.run), self.keep_last, self.keep_every))

    def restore(self, engine: Engine, required: bool, log: Callable[[str], None]) -> Manifest | None:
        """Load the newest whole checkpoint into `engine`. Collective; None when the run has none.

        Raises:
            NothingToResume: there is none, and `required`.
            ConfigError: it belongs to another base, adapter or data set.
            StorageError: there are some, but none is whole: starting over would hide that.
        """
        skipped: list[str] = []
        damaged = 0
        candidates = readable_manifests(self.run, skipped) if self.ranks.rank == 0 else iter(())
        while True:
            manifest: Manifest | None = self.ranks.broadcast(next(candidates, None))
            for reason in skipped:
                log(f"checkpoint skipped: {reason}")
            damaged += len(skipped)
            skipped.clear()
            if manifest is None:
                break
            if self._whole(manifest, log):
                _check_identity(manifest, self.identity)
                load_partitions(self.run, manifest, engine.partitions())
                engine.refresh(manifest.updates)
                if self.ranks.rank == 0:
                    self._set_aside(newer_than=manifest.step)
                return manifest
            damaged += 1
        if self.ranks.sum(damaged):
            raise StorageError(
                f"no checkpoint of {self.run.uri} is whole; the ranks' logs say why. Restore its files, or start a run of "
                "another name."
            )
        if required:
            raise NothingToResume(f"{self.run.uri} has no committed checkpoint. Start it with `capstan train`.")
        return None

    def _set_aside(self, newer_than: int) -> None:
        """Rename the damaged checkpoints' manifests: their steps come again, and a commit only ever creates."""
        for step in committed_steps(self.run):
            if step > newer_than:
                key = run_layout.manifest(step)
                self.run.put(run_layout.damaged_manifest(step, self.generation), self.run.get(key))
                self.run.delete(key)

    def _whole(self, manifest: Manifest, log: Callable[[str], None]) -> bool:
        """Whether every shard's bytes are right; the shards are divided over the ranks. Collective."""
        mine = manifest.shards[self.ranks.rank :: self.ranks.world_size]
        problems = [problem for shard in mine if (problem := verify_shard(self.run, shard))]
        for problem in problems:
            log(f"checkpoint of step {manifest.step} skipped: {problem}")
        return self.ranks.sum(len(problems)) == 0


def _write_shard(run: Store, key: str, tensors: dict[str, Tensor], intervals: dict[str, tuple[int, int]]) -> Shard:
    data = safetensors_bytes(tensors)
    run.put(key, data)
    return Shard(key, len(data), hashlib.sha256(data).hexdigest(), intervals)


def _check_identity(manifest: Manifest, identity: Identity) -> None:
    """What the checkpoint was trained on must be what this run trains on, and its position must mean the same."""
    parts = (
        ("base", manifest.base, identity.base),
        ("adapter", manifest.adapter, identity.adapter),
        ("data order", manifest.order, identity.order),
    )
    for what, saved, given in parts:
        for key in sorted(saved.keys() | given.keys()):
            if key != "path" and saved.get(key) != given.get(key):
                raise ConfigError(
                    f"the checkpoint of step {manifest.step} has {what} {key}: {saved.get(key)!r}, the configuration gives "
                    f"{given.get(key)!r}. Set it back, or start a run of another name."
                )
    if manifest.dataset != identity.dataset:
        raise ConfigError(
            f"the checkpoint of step {manifest.step} was trained on data {manifest.dataset}, the configuration's sources give "
            f"{identity.dataset}. Restore the sources, or start a run of another name."
        )


def load_partitions(run: Store, manifest: Manifest, partitions: list[TrainablePartition]) -> None:
    """Fill the partitions' states from whatever intervals the checkpoint's ranks wrote: any world size loads."""
    shapes = {part.name: list(part.shape) for part in partitions}
    assert shapes == manifest.shapes, "the adapter's identity was checked, so its shapes must agree"
    headers: dict[str, dict[str, TensorSource]] = {}
    for part in partitions:
        for shard in manifest.shards:
            saved_begin, saved_end = shard.intervals.get(part.name, (0, 0))
            begin, end = max(part.begin, saved_begin), min(part.end, saved_end)
            if begin >= end:
                continue
            if shard.key not in headers:
                headers[shard.key] = read_header(run, shard.key, shard.size)
            for key in STATES:
                data = headers[shard.key][f"{part.name}|{key}"].read(begin - saved_begin, end - saved_begin)
                part.states[key][begin - part.begin : end - part.begin] = torch.frombuffer(data, dtype=torch.float32)
