"""Ranks that export while the stores fail, stall or kill them."""

from pathlib import Path
from typing import Any

from tests import material
from tests.dist.faults import each_fault
from tests.dist.runs import outcome_of
from tests.faulty import Fault, FaultyStore
from tests.stored import store_as
from trainer.export.format import ExportProgress
from trainer.export.proof.rows import training_rows
from trainer.export.write.adapter import export_adapter
from trainer.export.write.as_stored import export_as_stored
from trainer.export.write.merged import export_merged
from trainer.state.checkpoint.manifest import problems_of, read_manifest
from trainer.store.store import Store, open_store

# Exports: of the adapter, merged, and merged as the base is stored. Each with the file without which nothing loads what
# it has left.


def export_in_stored_codes(run: Store, destination: Store) -> None:
    quiet = ExportProgress(lambda done, total: None, lambda sentence: None)
    export_as_stored(run, destination, None, rounding="dither", read_rows=training_rows, progress=quiet)


EXPORTS = {
    "adapter": (export_adapter, "adapter_config.json"),
    "merged": (export_merged, "config.json"),
    "stored": (export_in_stored_codes, "config.json"),
}


def exports(uri: str, folder: str, kind: str) -> dict[str, Any]:
    """An export, once for each operation on the run's store and the destination, and each way to go wrong."""
    root, last = open_store(uri), EXPORTS[kind][1]
    run = exportable(root, Path(folder), kind)
    expected = _exported(root, run, Fault(), "expected", kind)[0]
    wrong: list[str] = []
    operations: list[str] = []
    for how, at in each_fault(operations):
        fault, name = Fault(at, how), f"{how}-{at}"
        left, outcome = _exported(root, run, fault, name, kind)
        operations[:] = operations or fault.operations
        if last in left and left != expected:
            wrong.append(f"{name}: a half export can be loaded")
        if outcome["outcome"] == "finished" and left != expected:
            wrong.append(f"{name}: it ended well, but the files are others")
        if outcome["outcome"] != "finished" and last not in left:
            again, _ = _exported(root, run, Fault(), name, kind)
            wrong += [] if again == expected else [f"{name}: exporting again does not mend it"]
        wrong += [f"{name}: {text}" for text in problems_of(run, read_manifest(run, 4))]
    return {"operations": operations, "wrong": wrong}


def _exported(root: Store, run: Store, fault: Fault, name: str, kind: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    destination, (export, _) = root.sub("exports").sub(name), EXPORTS[kind]
    outcome = outcome_of(lambda: export(FaultyStore(run, fault), FaultyStore(destination, fault)))
    return {entry.key: destination.get(entry.key) for entry in destination.list()}, outcome


def exportable(root: Store, folder: Path, kind: str) -> Store:
    """A run with its configuration and a checkpoint of step 4, over a base of two files."""
    workshop, stored = material.Workshop(folder, "speck", shard_size="4KB"), list[str]()
    if kind == "stored":
        plain = material.make_base(folder / "plain", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
        stored = [f"model.base={store_as(plain, folder / 'int4', 'int4-32')}", "tuning.alpha=0.05", "quant.type=none"]
    config = workshop.config("done", f"run.store={root.uri}", *stored)
    material.commit(root.sub("done"), config)
    return root.sub("done")


def prepare_export(uri: str, folder: str, kind: str) -> None:
    exportable(open_store(uri), Path(folder), kind)


def killed_export(uri: str, kind: str, at: int) -> None:
    """Dies at operation `at`, if it has so many."""
    root = open_store(uri)
    _exported(root, root.sub("done"), Fault(at, "kill"), str(at), kind)


def after_killed_exports(uri: str, kind: str, count: int) -> list[str]:
    """The problems of the `count` destinations that killed exports left, and of exporting to them again."""
    root, wrong = open_store(uri), []
    run = root.sub("done")
    expected, _ = _exported(root, run, Fault(), "expected", kind)
    for at in range(1, count + 1):
        left = {entry.key for entry in root.sub("exports").sub(str(at)).list()}
        wrong += [f"killed at {at}: a half export can be loaded"] if EXPORTS[kind][1] in left else []
        again, _ = _exported(root, run, Fault(), str(at), kind)
        wrong += [] if again == expected else [f"killed at {at}: exporting again does not mend it"]
    return wrong + problems_of(run, read_manifest(run, 4))
