"""`capstan data build`: compile ahead of time, with a progress bar."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from trainer.base import check_base, resolve_base
from trainer.config import load_config
from trainer.data.compile import Progress
from trainer.data.dataset import Manifest, open_dataset
from trainer.data.prepare import locate, prepare
from trainer.errors import NotFound
from trainer.store import open_store


@dataclass(frozen=True)
class Built:
    """What is compiled, by split; None where a dry run found that it still has to be."""

    splits: dict[str, tuple[str, Manifest | None]]

    def to_json(self) -> dict[str, Any]:
        return {
            what: {"fingerprint": key, "compiled": manifest is not None, **(_figures(manifest) if manifest else {})}
            for what, (key, manifest) in self.splits.items()
        }

    def table(self) -> Table:
        table = Table("", *self.splits)
        table.add_row("fingerprint", *(key for key, _ in self.splits.values()))
        compiled = [_figures(manifest) if manifest else {} for _, manifest in self.splits.values()]
        table.add_row("state", *("compiled" if figures else "to be compiled" for figures in compiled))
        for name in next((figures for figures in compiled if figures), {}):
            table.add_row(name.replace("_", " "), *(f"{figures[name]:,}" if figures else "" for figures in compiled))
        return table


def _figures(manifest: Manifest) -> dict[str, int]:
    shards, counters = manifest.shards, manifest.counters
    return {
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "targets": sum(shard.targets for shard in shards),
        "truncated": counters.truncated,
        "dropped": counters.dropped,
        "without_targets": counters.without_targets,
        "bad_rows": counters.bad_rows,
    }


def build(path: Path, overrides: Sequence[str], *, dry_run: bool) -> Built:
    config = load_config(path, overrides)
    base, store = resolve_base(config.model), open_store(config.run.store)
    check_base(base, config)
    if not dry_run:
        with Bars(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=Console(stderr=True)
        ) as bars:
            tasks = {what: bars.add_task(f"{what}: waiting") for what in ("train", "eval")}

            def show(what: str, now: Progress) -> None:
                text = f"{what}: file {now.files_done}/{now.files}, {now.documents:,} documents, {now.tokens:,} tokens"
                bars.update(tasks[what], description=text)

            prepare(config, base, store, show)
    splits: dict[str, tuple[str, Manifest | None]] = {}
    for what, key in locate(config, base).items():
        try:
            splits[what] = (key, open_dataset(store, key).manifest)
        except NotFound:
            splits[what] = (key, None)
    return Built(splits)
