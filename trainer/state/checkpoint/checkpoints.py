"""Training state to the store and back, at any world size.

Save: each rank copies its intervals of what learns into host memory (the loop's only wait), and uploads them in the
background. The loop calls `advance` at every step border with whether all ranks are `ready`; once all shards are up,
rank 0 writes the manifest with a create-only PUT, in the background too: the commit. Restore: newest manifest first;
every shard is hashed once across the ranks; where one is damaged, all ranks fall back together; each rank reads the
byte ranges that overlap its intervals.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer import config
from trainer.errors import NothingToResume, StorageError, Superseded
from trainer.processes.accelerator import is_accelerator
from trainer.processes.ranks import Team
from trainer.run import layout
from trainer.run.environment import versions
from trainer.state.checkpoint.identity import Identity, check_identity, is_written_anew
from trainer.state.checkpoint.manifest import (
    CheckpointManifest,
    committed_steps,
    read_doubt,
    read_elements,
    read_manifest,
    readable_manifests,
    shard_problem,
    write_doubt,
)
from trainer.state.checkpoint.retention import plan_removal, remove
from trainer.state.checkpoint.shard import Contents, EvenDivision, Key, ShardLayout, write_shard
from trainer.state.kept import LastUpdates
from trainer.state.optimizer import State, states_by_name
from trainer.store.store import Store


@dataclass(frozen=True)
class TrainablePartition:
    """This rank's part of one trainable parameter: elements [begin, end) of the flattened tensor, without padding.

    `states` are live 1-D views by the names of the optimizer's states, each with the values that the state is held
    with: of the master weight and AdamW's two moments, fp32 and of length end - begin.
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int
    states: dict[str, Tensor]


class Learner(Protocol):
    """The owner of what learns: the engine in a run, or a stand-in in tests that need no model."""

    def partitions(self) -> list[TrainablePartition]:
        """This rank's part of everything that learns, as live views, in a fixed order. Not collective."""
        ...

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The optimizer's groups by name, with the hyperparameters that do not depend on the step."""
        ...

    @property
    def updates(self) -> int:
        """The optimizer's step count, on which AdamW's bias correction and Adafactor's decay depend."""
        ...

    def refresh(self, updates: int) -> None:
        """Call after writing into `partitions`: sets the step count and everything that is derived from the masters.
        Collective.
        """
        ...


@dataclass
class _Pending:
    """A save in progress: first `work` is this rank's upload, then, once all shards are in the `manifest`, the
    commit.
    """

    manifest: CheckpointManifest
    started: float
    stall: float
    work: Future[Any]
    uploaded: bool = False


@dataclass(frozen=True)
class CommitHooks:
    """Functions of a run that are called when it saves.

    `record` gets what happens as (kind, values): commit, save_skipped, save_failed, prune_failed. `before` is called on
    rank 0 before each manifest is written, beside the training, and `after` after it, in the loop; `oldest` there
    beside the training, with the step of the oldest checkpoint that stays, when older ones were removed.
    """

    record: Callable[..., None]
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None
    oldest: Callable[[int], None] = lambda step: None


@dataclass
class Checkpoints:
    """One run's checkpoints, as one rank of one generation writes them. `evaluated` is the fingerprint of the data of
    their evaluation losses; `newest` is the step of the last save that has begun. `memory` outlives this rank.
    """

    run: Store
    ranks: Team
    generation: int
    identity: Identity
    rules: config.Checkpoint
    hooks: CommitHooks
    evaluated: str | None = None
    newest: int | None = None
    memory: LastUpdates | None = None
    _saves: int = 0
    _skipped: int = 0
    _failures: int = 0  # in a row
    _error: StorageError | None = None  # of the newest save
    _pending: _Pending | None = None
    _block: Tensor | None = None
    _kept_layout: ShardLayout | None = None
    _uploads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _proven: int | None = None  # step of a checkpoint that was read and is whole
    _next_pruning: Future[None] | None = None
    _pruning: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prune"))

    # --- save

    def save(
        self,
        learner: Learner,
        step: int,
        position: dict[str, Any],
        *,
        eval_loss: float | None = None,
        may_skip: bool = True,
    ) -> None:
        """Begin to save the state after `step` updates. Collective.

        While the save before is not done, waits for it; or skips this one, if the rules say so and the caller lets it.
        """
        if self._pending and may_skip and self.rules.when_busy == "skip":
            self._skipped += 1
            self.hooks.record("save_skipped", step=step, skipped=self._skipped)
            return
        started = time.monotonic()
        self._settle()
        partitions = learner.partitions()
        shard_layout = self._layout(partitions)
        data = self._copy(shard_layout, partitions)
        self._saves, self.newest = self._saves + 1, step
        key = layout.shard(step, layout.attempt(self.generation, self._saves), self.ranks.rank)
        manifest = self._manifest(learner, step, learner.updates, position, eval_loss)
        upload = self._uploads.submit(write_shard, self.run, key, shard_layout, data)
        self._pending = _Pending(manifest, started, time.monotonic() - started, upload)

    def keep(self, learner: Learner, step: int, position: dict[str, Any]) -> None:
        """Keep this rank's part of the state after `step` updates in `memory`."""
        assert self.memory is not None
        partitions = learner.partitions()
        if self._kept_layout is None:  # a partition's size does not change during a run
            self._kept_layout = self._layout(partitions)
        shard_layout = self._kept_layout
        facts = {"updates": learner.updates, "position": position}
        self.memory.keep(step, facts, shard_layout.size, lambda room: _copy_into(room, shard_layout, partitions))

    def doubt(self, after: int, reason: str) -> None:
        """Say why the states after more than `after` updates are in doubt: forget them in `memory`, with older ones
        than that, and mark the checkpoints, so that a start passes over them if there is an older one. Collective.
        """
        if self.memory is not None:
            self.memory.go_on_from(after)
        saving = {self.newest} if self.newest is not None else set[int]()

        def mark() -> None:
            steps = {step for step in {*committed_steps(self.run), *saving} if step > after}
            write_doubt(self.run, sorted(steps), self.generation, reason)

        self.ranks.on_first(mark)

    def _layout(self, partitions: list[TrainablePartition]) -> ShardLayout:
        """The places of this rank's states in its shard."""
        shapes = _shapes(partitions)
        division = EvenDivision({name: math.prod(shape) for name, shape in shapes.items()}, self.ranks.world_size)
        assert all((part.begin, part.end) == division.interval(part.name, self.ranks.rank) for part in partitions), (
            "a manifest writes no intervals: whoever reads it derives them by this rule"
        )
        states = states_by_name(self.identity.optimizer, shapes)
        return ShardLayout(Contents(division, states, self.ranks.world_size).of(self.ranks.rank))

    def _manifest(
        self, learner: Learner, step: int, updates: int, position: dict[str, Any], eval_loss: float | None = None
    ) -> CheckpointManifest:
        """The manifest of the state after `step` updates, without its shards."""
        return CheckpointManifest(
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
            objective=self.identity.objective,
            optimizer=self.identity.optimizer,
            text=self.identity.text,
            groups=learner.groups,
            versions=versions(),
            eval_loss=eval_loss,
            eval_data=None if eval_loss is None else self.evaluated,
            shapes=_shapes(learner.partitions()),
            shards=[],
        )

    def _copy(self, shard_layout: ShardLayout, partitions: list[TrainablePartition]) -> memoryview:
        """The states as bytes of host memory, in the file's layout. The memory is one block that is kept for every
        save.
        """
        on_gpu = is_accelerator(self.ranks.device)
        if self._block is None:
            # Pinned, so that the copies run at the bus's speed and none waits for the previous one.
            self._block = torch.empty(shard_layout.size, dtype=torch.uint8, pin_memory=on_gpu)
        assert self._block.numel() == shard_layout.size, "a partition's size does not change during a run"
        _copy_into(self._block, shard_layout, partitions)
        return self._block.numpy().data

    @property
    def ready(self) -> bool:
        """Whether this rank has no background work for a save, or has finished it."""
        return self._pending is None or self._pending.work.done()

    def advance(self, all_ready: bool) -> None:
        """Advance the save in progress by a stage once every rank is ready: to the commit, then to its end. Collective.

        Raises:
            StorageError: too many saves failed one after the other; `Superseded` when a later generation has taken over
                the run.
        """
        pending = self._pending
        if pending is None or not all_ready:
            return
        # A failure on one rank fails all, because a rank that raised alone would leave the others in their next
        # collective.
        outcomes = self.ranks.gather_objects(_outcome(pending.work))
        failed = next((rank for rank, outcome in enumerate(outcomes) if isinstance(outcome, StorageError)), None)
        if failed is not None:
            self._fail(failed, pending.manifest.step, outcomes[failed])
        elif not pending.uploaded:
            pending.uploaded = True
            pending.manifest = replace(pending.manifest, shards=outcomes)
            pending.work = self._uploads.submit(self._commit, pending.manifest)
        else:
            self._end(pending)

    def _end(self, pending: _Pending) -> None:
        self._pending, self._failures = None, 0
        self.hooks.record(
            "commit",
            step=pending.manifest.step,
            bytes=pending.manifest.size,
            seconds=round(time.monotonic() - pending.started, 3),
            stall_seconds=round(pending.stall, 4),
            key=layout.manifest(pending.manifest.step),
        )
        if self.ranks.rank == 0:
            self.hooks.after()
        # A removal that has not begun yet will see this commit, too.
        waits = self._next_pruning and not (self._next_pruning.running() or self._next_pruning.done())
        if self.ranks.rank == 0 and not waits:
            self._next_pruning = self._pruning.submit(self._prune)

    def _fail(self, rank: int, step: int, error: StorageError) -> None:
        self._pending = None
        self._failures += 1
        if not isinstance(error, Superseded):
            error = StorageError(f"rank {rank} could not save the checkpoint of step {step}: {error}")
        self._error = error
        self.hooks.record("save_failed", step=step, rank=rank, failures=self._failures, reason=str(error))
        if isinstance(error, Superseded) or self._failures > self.rules.failed_saves:
            raise error

    def _settle(self) -> None:
        """Wait for the end of the save in progress. Collective."""
        self._error = None
        while self._pending is not None:
            _outcome(self._pending.work)
            self.advance(all_ready=True)

    def finish(self) -> None:
        """Wait until the save in progress is committed. Collective; raises `StorageError` if it failed."""
        self._settle()
        if self._error is not None:
            raise self._error

    def prove(self) -> None:
        """`finish`, then read the checkpoint back, so that a run that cannot save ends now and not when a rank is first
        lost.

        Collective; raises `StorageError` when the store returns something else than was written.
        """
        assert self._pending is not None
        step = self._pending.manifest.step
        self.finish()
        problems = self._verify(self.ranks.on_first(lambda: read_manifest(self.run, step)))
        if problems:
            raise StorageError(f"{self.run.uri} does not keep what is written to it: {problems[0]}")
        self._proven = step

    def _commit(self, manifest: CheckpointManifest) -> None:
        """On rank 0 write the manifest, unless a later generation has taken over."""
        if self.ranks.rank != 0:
            return
        self.hooks.before()
        newest = max((layout.generation_of(entry.key) or 0 for entry in self.run.list(layout.METRICS)), default=0)
        if newest > self.generation:
            raise Superseded(
                f"{self.run.uri}: generation {newest} of this run has started; generation {self.generation} must not "
                "commit any more. Two jobs of one run are alive: end one."
            )
        self.run.create(layout.manifest(manifest.step), manifest.to_json())

    def _prune(self) -> None:
        """Remove old checkpoints, in the background after each commit. A failed removal is tried again after the next
        commit.
        """
        try:
            saving = layout.attempt(self.generation, self._saves)
            removal = plan_removal(self.run, self.rules, proven=self._proven, saving=saving)
            remove(self.run, removal)
            if removal.steps:
                self.hooks.oldest(min(removal.kept))
        except StorageError as error:
            self.hooks.record("prune_failed", reason=str(error))
            return
        self._proven = removal.proven or self._proven
        if removal.warning:
            self.hooks.record("prune_failed", reason=removal.warning)

    # --- restore

    def restore(self, learner: Learner, required: bool, log: Callable[[str], None]) -> CheckpointManifest | None:
        """Load the newest whole checkpoint into `learner`. Collective; returns None if the run has none.

        Raises, on all ranks alike:
            NothingToResume: there is none, and `required`.
            ConfigError: it belongs to another base, adapter or data set.
            StorageError: there are some, but none is whole: starting over would hide that. Or the store fails.
        """
        self._settle()
        kept = self._from_memory(learner, log)
        if self.memory is not None:
            self.memory.go_on_from(kept and kept.step)
        if kept is not None:
            return kept
        damaged = False
        for manifest, problems in self._candidates(log):
            if manifest is not None:
                check_identity(manifest, self.identity)
                if is_written_anew(manifest, self.identity.base):
                    log(
                        f"the files of {self.identity.base['path']} have been written again since step {manifest.step};"
                        " the samples of their weights are the same"
                    )
                if manifest.shapes != _shapes(learner.partitions()):  # adapters of one identity have one set of shapes
                    problems = [
                        f"the manifest of step {manifest.step} names other parameters or shapes than its adapter has."
                    ]
            for problem in problems:
                log(f"checkpoint skipped: {problem}")
            damaged |= bool(problems)
            if manifest is None or problems:
                continue
            self.ranks.together(lambda found=manifest: load_partitions(self.run, found, learner.partitions()))
            learner.refresh(manifest.updates)
            self._proven = manifest.step
            _log_changes(manifest.groups, learner.groups, log)
            self.ranks.on_first(lambda found=manifest: self._set_aside(newer_than=found.step))
            return manifest
        if damaged:
            raise StorageError(
                f"no checkpoint of {self.run.uri} is whole; the ranks' logs say why. Restore its files, or start a run"
                " of another name."
            )
        if required:
            raise NothingToResume(f"{self.run.uri} has no committed checkpoint. Start it again from its configuration.")
        return None

    def _from_memory(self, learner: Learner, log: Callable[[str], None]) -> CheckpointManifest | None:
        """Load the state after the last update that all ranks find in `memory`, if no newer one without doubt is
        committed.
        """
        if self.memory is None:  # on all ranks alike
            return None
        found = self.memory.found()
        every = [set(steps) for steps in self.ranks.gather_objects(list(found))]
        step = max(set.intersection(*every), default=0)
        if not step or step <= self.ranks.on_first(self._newest_without_doubt):
            return None
        facts, data = found[step]
        partitions = learner.partitions()
        parts, shard_layout = {part.name: part for part in partitions}, self._layout(partitions)
        assert len(data) == shard_layout.size, "a run's ranks have the same parameters in each of its starts"
        for key, begin, end in shard_layout.places():
            values = _slice(parts[key.name], key.state, *shard_layout.contents[key])
            values.copy_(data[begin:end].view(values.dtype))
        learner.refresh(facts["updates"])
        log(f"goes on from step {step}, which is in memory")
        self.ranks.on_first(lambda: self._set_aside(newer_than=step))
        return self._manifest(learner, step, facts["updates"], facts["position"])

    def _newest_without_doubt(self) -> int:
        """The step of the newest checkpoint that is not in doubt; 0 if there is none."""
        return next((step for step in committed_steps(self.run) if self._read(step)[2] is None), 0)

    def _candidates(self, log: Callable[[str], None]) -> Iterator[tuple[CheckpointManifest | None, list[str]]]:
        """The checkpoints, newest first and the same on every rank: a whole one, or None with its problem. Those that
        are in doubt come last.
        """
        doubted = list[int]()
        for step in self.ranks.on_first(lambda: committed_steps(self.run)):
            manifest, problems, doubt = self.ranks.on_first(lambda step=step: self._read(step))
            if doubt is not None:
                log(f"checkpoint of step {step} passed over, because it is in doubt: {doubt}")
                doubted.append(step)
                continue
            if manifest is not None:
                problems = self._verify(manifest)
            yield (None if problems else manifest), problems
        for step in doubted:
            log(f"there is no checkpoint without doubt, so that of step {step} is looked at")
            manifest, problems, _ = self.ranks.on_first(lambda step=step: self._read(step))
            if manifest is not None:
                problems = self._verify(manifest)
            yield (None if problems else manifest), problems

    def _read(self, step: int) -> tuple[CheckpointManifest | None, list[str], str | None]:
        problems: list[str] = []
        manifest = next(readable_manifests(self.run, problems, [step]), None)
        return manifest, problems, None if manifest is None else read_doubt(self.run, manifest)

    def _verify(self, manifest: CheckpointManifest) -> list[str]:
        """The shards' problems that any rank found; the shards are divided over the ranks. Collective."""
        mine = range(self.ranks.rank, len(manifest.shards), self.ranks.world_size)
        found = self.ranks.together(lambda: [p for number in mine if (p := shard_problem(self.run, manifest, number))])
        return [problem for problems in found for problem in problems]

    def _set_aside(self, newer_than: int) -> None:
        """Rename the manifests of the checkpoints that are damaged or in doubt, because their steps come again and a
        commit never overwrites.
        """
        for step in committed_steps(self.run):
            if step > newer_than:
                key = layout.manifest(step)
                self.run.put(layout.damaged_manifest(step, self.generation), self.run.get(key))
                self.run.delete(key)


def _copy_into(room: Tensor, shard_layout: ShardLayout, partitions: list[TrainablePartition]) -> None:
    """Copy the states to host memory as the bytes of a shard, and wait until they are there."""
    parts = {part.name: part for part in partitions}
    on_gpu = False
    for key, begin, end in shard_layout.places():
        values = _slice(parts[key.name], key.state, *shard_layout.contents[key])
        on_gpu |= is_accelerator(values.device)
        room[begin:end].view(values.dtype).copy_(values, non_blocking=True)
    if on_gpu:
        torch.accelerator.synchronize()


def _outcome(work: Future[Any]) -> Any:
    """The result of the background work, or a `StorageError` that says why it failed. Waits for it."""
    error = work.exception()
    if error is None:
        return work.result()
    return error if isinstance(error, StorageError) else StorageError(f"{type(error).__name__}: {error}.")


def _log_changes(saved: dict[str, Any], given: dict[str, Any], log: Callable[[str], None]) -> None:
    """Log the optimizer's hyperparameters that differ from the checkpoint's. Those of the configuration apply."""
    for group, settings in json.loads(json.dumps(given)).items():
        for name, value in settings.items():
            before = saved.get(group, {}).get(name)
            if before != value:
                log(f"optimizer group {group}: {name} is {value} from now on; the checkpoint was saved with {before}")


def _shapes(partitions: list[TrainablePartition]) -> dict[str, list[int]]:
    return {part.name: list(part.shape) for part in partitions}


def _slice(part: TrainablePartition, state: State, begin: int, end: int) -> Tensor:
    """The values [begin, end) of a state that the rank holds, as a view."""
    first = state.held(part.begin, part.end)[0]
    return part.states[state.name][begin - first : end - first]


def load_partitions(
    folder: Store,
    manifest: CheckpointManifest,
    partitions: list[TrainablePartition],
    states: Sequence[State] | None = None,
) -> None:
    """Fill the partitions' `states`, or all that they have, from a checkpoint that any number of ranks wrote."""
    mine = {part.name: part for part in partitions}
    wanted = {
        Key(part.name, state): state.held(part.begin, part.end)
        for part in partitions
        for state in states or manifest.contents.states[part.name]
    }
    for (key, begin, end), data in read_elements(folder, manifest, wanted):
        values = _slice(mine[key.name], key.state, begin, end)
        values.copy_(torch.frombuffer(bytearray(data), dtype=values.dtype))
