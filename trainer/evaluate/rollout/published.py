"""The adapters that a run has published for the servers that sample, and their names there.

No torch, because a server's process imports this file.
"""

import re
from pathlib import Path
from typing import NamedTuple

from trainer.run import layout
from trainer.store.store import Store

_NAME = re.compile(r"((?!\.)[^/]+/rollouts/[0-9a-f]{12})/adapters/step-(\d{9})/([0-9a-f]{8})")


class Published(NamedTuple):
    """The adapter of the update `step` in the folder `place` of a store.

    `nonce` tells apart the processes that had it loaded.
    """

    place: str
    step: int
    nonce: str


def name_of(place: Store, step: int, nonce: str) -> str:
    """Return the name of an adapter in the folder of a run's rollouts, as a server gets it.

    The adapter is found from its name and the store of the runs.
    """
    return f"{'/'.join(place.uri.split('/')[-3:])}/{layout.rollout_adapter(step)}{nonce}"


def named(name: str) -> Published | None:
    """Return the adapter with this name; None for the name of anything else."""
    found = _NAME.fullmatch(name)
    return Published(found[1], int(found[2]), found[3]) if found else None


def published(place: Store) -> list[int]:
    """Return the updates whose adapters are there, in order."""
    steps = (layout.published_step(entry.key) for entry in place.list(layout.ROLLOUT_ADAPTERS))
    return sorted(step for step in steps if step is not None)


def fetch(place: Store, step: int, folder: Path) -> None:
    """Copy a published adapter into a new folder of this machine.

    Raises `NotFound` if it has been removed meanwhile.
    """
    folder.mkdir(parents=True)
    prefix = layout.rollout_adapter(step)
    for entry in place.list(prefix):
        with (folder / entry.key.removeprefix(prefix)).open("wb") as file:
            file.writelines(place.chunks(entry.key, entry.size))
    place.get(layout.published(step))  # the adapter was whole until now
