"""`capstan checkpoints ls | verify | prune`: what a run has committed, whether it is whole, and what may be removed."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from launcher.view.console import FoldedTable, Terminal
from trainer.run.folder import run_config
from trainer.run.lines import duration
from trainer.state.checkpoint.manifest import (
    CheckpointManifest,
    check_step,
    committed_steps,
    read_doubt,
    readable_manifests,
    shard_problem,
)
from trainer.state.checkpoint.retention import Removal, plan_removal, remove
from trainer.store.store import Store


@dataclass(frozen=True)
class CheckpointList:
    """A run's committed checkpoints, newest first, and what is wrong with others.

    `problems` is by step: a manifest that cannot be read and, when `verified`, shards that are not what was written.
    `doubts` says by step why the state may not be what the data and the settings make, though its files are whole.
    """

    run: str
    manifests: list[CheckpointManifest]
    verified: bool = False
    problems: dict[int, list[str]] = field(default_factory=dict)
    doubts: dict[int, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "step": manifest.step,
                "bytes": manifest.size,
                "created": manifest.created,
                "age_seconds": round(max(0.0, time.time() - manifest.created), 1),
                "world_size": manifest.world_size,
                "generation": manifest.generation,
                "eval_loss": manifest.eval_loss,
                "doubt": self.doubts.get(manifest.step),
            }
            for manifest in self.manifests
        ]
        problems = {str(step): reasons for step, reasons in self.problems.items()}
        return {"run": self.run, "checkpoints": rows, "verified": self.verified, "problems": problems}


def list_checkpoints(folder: Store) -> CheckpointList:
    """List what the manifests say, without reading a shard."""
    found = CheckpointList(folder.uri, [])
    for step in committed_steps(folder):
        problems: list[str] = []
        found.manifests.extend(readable_manifests(folder, problems, [step]))
        if problems:
            found.problems[step] = problems
    doubts = {manifest.step: read_doubt(folder, manifest) for manifest in found.manifests}
    found.doubts.update({step: doubt for step, doubt in doubts.items() if doubt is not None})
    return found


def verify_checkpoints(folder: Store, step: int | None) -> CheckpointList:
    """Read every shard (of `step`) and compare it with its manifest, showing the progress on stderr.

    Raises `NothingToResume` when there is nothing to verify, and `ConfigError` when there is no such step.
    """
    listed = list_checkpoints(folder)
    steps = {manifest.step for manifest in listed.manifests} | listed.problems.keys()
    check_step(folder, list(steps), step)
    chosen = [manifest for manifest in listed.manifests if step in (None, manifest.step)]
    problems = {number: reasons for number, reasons in listed.problems.items() if step in (None, number)}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as progress:
        task = progress.add_task("verifying", total=sum(manifest.size for manifest in chosen))
        for manifest in chosen:
            progress.update(task, description=f"verifying step {manifest.step:,}")
            for number, shard in enumerate(manifest.shards):
                if problem := shard_problem(folder, manifest, number):
                    problems.setdefault(manifest.step, []).append(problem)
                progress.advance(task, shard.size)
    return CheckpointList(folder.uri, chosen, verified=True, problems=problems, doubts=listed.doubts)


def checkpoint_table(found: CheckpointList) -> Group:
    table = FoldedTable("step", "size", "age", "world size", "generation", "eval loss")
    if found.verified:
        table.add_column("state")
    rows = {manifest.step: manifest for manifest in found.manifests}
    for step in sorted(rows.keys() | found.problems.keys(), reverse=True):
        state = [] if not found.verified else ["damaged" if step in found.problems else "whole"]
        table.add_row(f"{step:,}", *(_cells(rows[step]) if step in rows else ["?"] * 5), *state)
    said = [f"step {step:,}: {text}" for step, texts in found.problems.items() for text in texts]
    said += [f"step {step:,} is in doubt: {text}" for step, text in found.doubts.items() if step in rows]
    return Group(table, *map(Text, said))


def _cells(manifest: CheckpointManifest) -> list[str]:
    loss = "" if manifest.eval_loss is None else f"{manifest.eval_loss:.4f}"
    age = duration(max(0.0, time.time() - manifest.created))
    return [decimal(manifest.size), age, str(manifest.world_size), str(manifest.generation), loss]


@dataclass(frozen=True)
class Pruned:
    """The outcome of a prune: what was removed, or with `dry_run` what would be."""

    run: str
    dry_run: bool
    removal: Removal

    def to_json(self) -> dict[str, Any]:
        return {"run": self.run, "dry_run": self.dry_run, **asdict(self.removal)}

    def sentence(self) -> str:
        removal = self.removal
        steps = ", ".join(f"{step:,}" for step in sorted(removal.steps)) or "none"
        kept = ", ".join(f"{step:,}" for step in sorted(removal.kept)) or "none"
        verb = "would remove" if self.dry_run else "removed"
        return (
            f"{verb} checkpoints of steps: {steps}; orphans: {len(removal.orphans)}; {decimal(removal.bytes)} in all. "
            f"Kept steps: {kept}." + (f" Attention: {removal.warning}" if removal.warning else "")
        )


def prune_checkpoints(
    folder: Store,
    *,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: int | None,
    orphan_hours: float,
    dry_run: bool,
    log: Callable[[str], None],
) -> Pruned:
    """Apply the run's own retention rules, or the given ones, and collect orphans older than `orphan_hours`."""
    given = {"keep_last": keep_last, "keep_every": keep_every, "keep_best": keep_best}
    changes = {name: count for name, count in given.items() if count is not None}
    removal = plan_removal(folder, run_config(folder).checkpoint.model_copy(update=changes), orphan_hours=orphan_hours)
    if not dry_run:
        log(f"removing {len(removal.steps)} checkpoints and {len(removal.orphans)} orphans of {folder.uri}")
        remove(folder, removal)
    return Pruned(folder.uri, dry_run, removal)
