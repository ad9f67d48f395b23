"""The folders of a run's checkpoints, found without listing every shard.

A hundred checkpoints of a thousand ranks are a hundred thousand objects: a listing of all takes as many requests as a
look into each checkpoint's folder, but a hundred times the bytes, and on a disk a look at each file.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from trainer.run import layout
from trainer.store.store import Entry, Store

_LOOKS_AT_A_TIME = 16


class StepFolder(NamedTuple):
    """The folder of one step's checkpoint, with the number of attempts at its save. It is committed if it has a
    manifest.
    """

    step: int
    manifest: Entry | None
    attempts: int


def step_folders(folder: Store) -> list[StepFolder]:
    """The folders, newest first: one request, and one more for each folder."""
    with ThreadPoolExecutor(_LOOKS_AT_A_TIME) as pool:
        return list(pool.map(lambda step: _look(folder, step), _steps(folder)))


def newest_commit(folder: Store) -> StepFolder | None:
    """The newest committed step. Two requests, unless the newest folders belong to saves that were never committed."""
    looks = (_look(folder, step) for step in _steps(folder))
    return next((found for found in looks if found.manifest is not None), None)


def _steps(folder: Store) -> list[int]:
    names = folder.children(layout.CHECKPOINTS)[0]
    return sorted((step for name in names if (step := layout.step_of_folder(name)) is not None), reverse=True)


def _look(folder: Store, step: int) -> StepFolder:
    attempts, entries = folder.children(layout.checkpoint(step))
    manifest = next((entry for entry in entries if entry.key == layout.manifest(step)), None)
    return StepFolder(step, manifest, len(set(attempts) - {layout.ADAPTER}))


def committed_steps(folder: Store) -> list[int]:
    """The steps that have a manifest, newest first. Only reading a manifest shows whether the checkpoint is whole."""
    return [found.step for found in step_folders(folder) if found.manifest is not None]
