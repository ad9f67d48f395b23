"""Which checkpoints a run keeps, and the removal of the others and of what dead saves left behind.

A removed checkpoint loses its manifest first, so it is never chosen half gone; a removal that dies in between leaves
shards that nothing refers to, and those are orphans like any other.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from trainer.checkpoint.manifest import read_manifest, readable_manifests
from trainer.errors import Damaged, NotFound
from trainer.run import layout
from trainer.store import Entry, Store

# A save that has not been committed by then never will be.
ORPHAN_HOURS = 24.0


@dataclass(frozen=True)
class Retention:
    """Kept are the last so many, every step that is a multiple, and the best so many by evaluation loss."""

    keep_last: int
    keep_every: int = 0
    keep_best: int = 0

    def removable(self, steps: list[int], losses: dict[int, float]) -> list[int]:
        """Which of the committed `steps` (newest first) go. `losses`: step -> evaluation loss, of those that have one."""
        best = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], -step))
        kept = {*steps[: self.keep_last], *best[: self.keep_best]}
        return [step for step in steps if step not in kept and not (self.keep_every and step % self.keep_every == 0)]


@dataclass
class Removal:
    """What is to go: whole checkpoints by step, and single objects that no commit refers to; `bytes` of both."""

    kept: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    bytes: int = 0


def plan_removal(
    run: Store,
    rules: Retention,
    *,
    orphan_hours: float = ORPHAN_HOURS,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Removal:
    """What `rules` remove from the run, and which orphans are older than `orphan_hours`. Changes nothing."""
    folders: dict[int, list[Entry]] = defaultdict(list)
    for entry in run.list(layout.CHECKPOINTS):
        step = layout.step_of(entry.key)
        if step is not None:
            folders[step].append(entry)
    committed = {step for step, entries in folders.items() if any(e.key == layout.manifest(step) for e in entries)}
    newest_first = sorted(committed, reverse=True)
    losses: dict[int, float] = {}
    if rules.keep_best:
        manifests = readable_manifests(run, [], newest_first)
        losses = {found.step: found.eval_loss for found in manifests if found.eval_loss is not None}
    removal = Removal(steps=rules.removable(newest_first, losses))
    removal.kept = [step for step in newest_first if step not in removal.steps]
    for step in removal.steps:
        removal.bytes += sum(entry.size for entry in folders[step])
    before = now() - timedelta(hours=orphan_hours)
    for step in sorted(folders.keys() - set(removal.steps)):
        for entry in _unreferenced(run, step, folders[step], committed=step in committed):
            if entry.modified < before:
                removal.orphans.append(entry.key)
                removal.bytes += entry.size
    return removal


def _unreferenced(run: Store, step: int, entries: list[Entry], *, committed: bool) -> list[Entry]:
    """Objects of a step's folder that its commit does not name. A damaged manifest is taken to name them all."""
    if not committed:
        return entries
    attempts = {entry.key.rpartition("/")[0] for entry in entries}
    if len(attempts) <= 2:
        return []  # the manifest's folder and one attempt's: the usual case costs no read
    try:
        manifest = read_manifest(run, step)
    except (Damaged, NotFound):
        return []
    named = {layout.manifest(step), *(shard.key for shard in manifest.shards)}
    return [entry for entry in entries if entry.key not in named]


def remove(run: Store, removal: Removal) -> None:
    """Carry `removal` out; what is gone already is no error."""
    for step in removal.steps:
        run.delete(layout.manifest(step))
        run.delete_folder(layout.checkpoint(step))
    for key in removal.orphans:
        run.delete(key)
