"""`capstan data build`: compile ahead of time; and how a compilation shows how far it is, whoever started it."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from launcher.ray.cluster import address_of, is_dashboard
from launcher.ray.data import join_and_map
from trainer.base.locate import resolve_base
from trainer.base.parameters import check_base
from trainer.config import load_config
from trainer.data.compile import Progress
from trainer.data.dataset import Manifest, read_manifest
from trainer.data.prepare import locate, prepare
from trainer.errors import NotFound
from trainer.store import open_run_store

_LOG_SECONDS = 10.0


@contextmanager
def compile_progress(log: Callable[[str], None], *, bar: bool) -> Iterator[Callable[[str, Progress], None]]:
    """Shows what `prepare` reports: as a bar on the terminal, or as a line of the log now and then."""
    first: tuple[float, int] | None = None

    def describe(what: str, now: Progress) -> str:
        nonlocal first
        first = first or (time.monotonic(), now.tokens)
        speed = (now.tokens - first[1]) / max(time.monotonic() - first[0], 1e-3)
        return f"compiling {what} data: {now.documents:,} documents, {now.tokens:,} tokens, {speed:,.0f} tokens/s"

    if not bar:
        next_line = 0.0

        def line(what: str, now: Progress) -> None:
            nonlocal next_line
            if time.monotonic() >= next_line:
                log(f"{describe(what, now)} ({100 * now.bytes_done / max(now.bytes, 1):.0f} %)")
                next_line = time.monotonic() + _LOG_SECONDS

        yield line
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(what: str, now: Progress) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], description=describe(what, now), completed=now.bytes_done, total=now.bytes)

        yield draw


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
        "split": counters.split,
        "dropped": counters.dropped,
        "without_targets": counters.without_targets,
        "bad_rows": counters.bad_rows,
    }


def build(path: Path, overrides: Sequence[str], *, dry_run: bool, log: Callable[[str], None]) -> Built:
    """Compile what is missing: on the Ray cluster of cluster.ray.address or RAY_ADDRESS, else on this machine's cores."""
    config = load_config(path, overrides)
    base, store = resolve_base(config.model), open_run_store(config)
    check_base(base, config)
    if not dry_run:
        cluster = address_of(config)
        if cluster and is_dashboard(cluster):
            log(
                f"compiling on this machine: {cluster} takes jobs, and no driver. Give the cluster's own address, such as head:6379."
            )
            cluster = None
        mapper = partial(join_and_map, cluster, log) if cluster else None
        with compile_progress(log, bar=sys.stderr.isatty()) as show:
            prepare(config, base, store, show, mapper)
    splits: dict[str, tuple[str, Manifest | None]] = {}
    for what, key in locate(config, base).items():
        try:
            splits[what] = (key, read_manifest(store, key))
        except NotFound:
            splits[what] = (key, None)
    return Built(splits)
