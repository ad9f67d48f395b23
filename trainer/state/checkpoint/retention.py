"""Which checkpoints a run keeps, and the removal of the others and of what dead saves left behind.

Nothing is removed before one of those that stay was read and found whole, so the last good checkpoint outlives newer
ones that are damaged. A removed checkpoint loses its manifest first, so it is never chosen half gone; a removal that
dies in between leaves shards that nothing refers to, and those are orphans like any other.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from trainer.config import Checkpoint
from trainer.errors import Damaged, NotFound
from trainer.run import layout
from trainer.run.owner import StoreClock
from trainer.state.checkpoint.manifest import (
    StepFolder,
    comparable_losses,
    read_manifest,
    readable_manifests,
    shard_problem,
    step_folders,
)
from trainer.store.store import Entry, Store

# A save that has not been committed by then never will be.
ORPHAN_HOURS = 24.0


def removable(rules: Checkpoint, steps: list[int], losses: dict[int, float]) -> list[int]:
    """Return the committed `steps` (newest first) to remove. `losses`: step -> evaluation loss, if it has one."""
    best = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], -step))
    kept = {*steps[: rules.keep_last], *best[: rules.keep_best]}
    return [step for step in steps if step not in kept and not (rules.keep_every and step % rules.keep_every == 0)]


@dataclass
class Removal:
    """Planned removals: checkpoints by step, and single objects that no commit refers to; `bytes` of both.

    `proven` is the step of one that stays and is whole. `damaged` says of every step that was read before it what is
    wrong with it.
    """

    kept: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    bytes: int = 0
    proven: int | None = None
    damaged: dict[int, str] = field(default_factory=dict)

    @property
    def warning(self) -> str | None:
        """A sentence for people, when the rules alone would have left no whole checkpoint."""
        if not self.damaged:
            return None
        step, problem = next(iter(self.damaged.items()))
        stays = "Nothing is removed, as no older one is whole" if self.proven is None else f"Step {self.proven} stays"
        return f"the checkpoint of step {step} is damaged: {problem} {stays}."


def plan_removal(
    folder: Store,
    rules: Checkpoint,
    *,
    proven: int | None = None,
    orphan_hours: float = ORPHAN_HOURS,
    saving: str | None = None,
    now: Callable[[], float] | None = None,
) -> Removal:
    """Find what `rules` remove from the run, and which orphans are older than `orphan_hours`. Changes nothing.

    `saving` is the newest attempt at a save (`layout.attempt`). What it and later ones have written is no orphan, even
    if the clock is set meanwhile. `now` gives seconds since 1970; by default it is the store's clock.

    Reads every byte of one checkpoint that stays, unless `proven`, a step known to be whole, does. Where all that
    `rules` keep are damaged, the newest whole one stays too; where none is whole, all stay.
    """
    folders = step_folders(folder)
    newest_first = [found.step for found in folders if found.manifest is not None]
    losses: dict[int, float] = {}
    if rules.keep_best:
        losses = comparable_losses(readable_manifests(folder, [], newest_first))
    removal = Removal(steps=removable(rules, newest_first, losses))
    removal.kept = [step for step in newest_first if step not in removal.steps]
    if removal.steps:
        _keep_a_whole_one(folder, removal, proven)
    for step in removal.steps:
        removal.bytes += sum(entry.size for entry in folder.list(layout.checkpoint(step)))
    unreferenced = [
        entry
        for found in reversed(folders)
        if found.step not in removal.steps
        for entry in _unreferenced(folder, found)
        if saving is None or (layout.attempt_of(entry.key) or "") < saving
    ]
    oldest = (now or StoreClock(folder))() - 3600 * orphan_hours if unreferenced else 0.0
    for entry in unreferenced:
        if entry.modified.timestamp() < oldest:
            removal.orphans.append(entry.key)
            removal.bytes += entry.size
    return removal


def _keep_a_whole_one(folder: Store, removal: Removal, proven: int | None) -> None:
    """Move steps from those that go to those that stay, until a whole one stays."""
    if proven in removal.kept:
        removal.proven = proven
        return
    for step in [*removal.kept, *removal.steps]:
        problem = _problem(folder, step)
        if problem is None:
            removal.proven = step
            removal.kept = sorted({*removal.kept, step}, reverse=True)
            removal.steps = [other for other in removal.steps if other != step]
            return
        removal.damaged[step] = problem
    removal.kept, removal.steps = sorted([*removal.kept, *removal.steps], reverse=True), []


def _problem(folder: Store, step: int) -> str | None:
    """The first thing that is wrong with the checkpoint of `step`; None when it is whole."""
    try:
        manifest = read_manifest(folder, step)
    except (Damaged, NotFound) as error:
        return str(error)
    return next(filter(None, (shard_problem(folder, manifest, number) for number in range(len(manifest.shards)))), None)


def _unreferenced(folder: Store, step: StepFolder) -> list[Entry]:
    """Objects of a step's folder that its commit does not name, less the adapter beside it. A damaged manifest is taken
    to name them all."""
    prefix = layout.checkpoint(step.step)
    if step.manifest is None:
        return folder.list(prefix) + folder.half_written(prefix)
    if step.attempts <= 1:
        return []  # the usual case costs no request
    try:
        manifest = read_manifest(folder, step.step)
    except (Damaged, NotFound):
        return []
    named = {
        layout.manifest(step.step),
        layout.doubt(step.step, manifest.generation),
        *(shard.key for shard in manifest.shards),
    }
    beside = f"{layout.adapter(step.step)}/"
    objects = folder.list(prefix) + folder.half_written(prefix)
    return [entry for entry in objects if entry.key not in named and not entry.key.startswith(beside)]


def remove(folder: Store, removal: Removal) -> None:
    """Carry `removal` out; what is gone already is no error."""
    for step in removal.steps:
        folder.delete(layout.manifest(step))
        folder.delete_folder(layout.checkpoint(step))
    for key in removal.orphans:
        folder.delete(key)
