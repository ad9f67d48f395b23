"""`capstan data build`: compile ahead of time."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from launcher.cluster.ray.cluster import address_of, is_dashboard
from launcher.cluster.ray.data import join_and_map
from launcher.view.compiling import compile_progress
from launcher.view.console import FoldedTable
from trainer.base.find.check import check_base
from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.config.secrets import refuse_secrets
from trainer.data.compile.prepare import locate, prepare
from trainer.data.dataset.manifest import DatasetManifest, read_manifest
from trainer.errors import NotFound
from trainer.store.store import open_run_store


@dataclass(frozen=True)
class Built:
    """The compiled data by split; None if a dry run found that it still has to be compiled."""

    splits: dict[str, tuple[str, DatasetManifest | None]]

    def to_json(self) -> dict[str, Any]:
        found = dict[str, Any]()
        for what, (key, manifest) in self.splits.items():
            found[what] = {"fingerprint": key, "compiled": manifest is not None}
            if manifest:
                left_out = {name: rows.model_dump() for name, rows in (manifest.left_out or {}).items()}
                found[what] |= {**_figures(manifest), "left_out": left_out}
        return found

    def table(self) -> FoldedTable:
        table = FoldedTable("", *self.splits)
        table.add_row("fingerprint", *(key for key, _ in self.splits.values()))
        compiled = [_figures(manifest) if manifest else {} for _, manifest in self.splits.values()]
        table.add_row("state", *("compiled" if figures else "to be compiled" for figures in compiled))
        for name in next((figures for figures in compiled if figures), {}):
            table.add_row(name.replace("_", " "), *(f"{figures[name]:,}" if figures else "" for figures in compiled))
        return table


def _figures(manifest: DatasetManifest) -> dict[str, int]:
    counters = manifest.counters
    return {
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "targets": manifest.targets,
        "truncated": counters.truncated,
        "split": counters.split,
        "dropped": counters.dropped,
        "without_targets": counters.without_targets,
        "bad_rows": counters.bad_rows,
    }


def build(config: Config, *, dry_run: bool, log: Callable[[str], None]) -> Built:
    """Compile what is missing, on the Ray cluster of cluster.ray.address or RAY_ADDRESS, else on this machine."""
    refuse_secrets(config)
    base, store = resolve_base(config.model), open_run_store(config)
    check_base(base, config)
    if not dry_run:
        cluster = address_of(config)
        if cluster and is_dashboard(cluster):
            log(
                f"compiling on this machine: {cluster} takes jobs, and no driver. Give the cluster's own address, such"
                " as head:6379."
            )
            cluster = None
        mapper = partial(join_and_map, cluster, log) if cluster else None
        with compile_progress(log, bar=sys.stderr.isatty()) as show:
            prepare(config, base, store, show, mapper)
    splits: dict[str, tuple[str, DatasetManifest | None]] = {}
    for what, key in locate(config, base).items():
        try:
            splits[what] = (key, read_manifest(store, key))
        except NotFound:
            splits[what] = (key, None)
    return Built(splits)
