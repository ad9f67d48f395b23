"""The runs of a store, by name: a folder that holds a configuration is a run."""

import difflib
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import compress

from trainer.errors import ConfigError, shown
from trainer.run import layout
from trainer.run.folder import command, kept_settings
from trainer.run.owner import StoreClock, preparer
from trainer.store.store import Store, open_store


def poll_seconds(folder: Store) -> float:
    """Return the seconds between two looks. A bucket bills each listing; a folder does not."""
    return 0.5 if folder.uri.startswith(("file://", "memory://")) else 5.0


_REQUESTS_AT_A_TIME = 16
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""The names that a run's folder can have."""


def find_run(run: str, store: str, *, prepared: bool = False) -> Store:
    """Return the folder of `run`, a name in `store`, or a full URI or path.

    With `prepared` a run that a start prepares counts too, which has no configuration yet. Raises `ConfigError`, naming
    the existing runs, when there is no such run.
    """
    parent, _, name = run.rstrip("/").rpartition("/") if "/" in run else (store, "", run)
    root = open_store(parent or "/")
    if NAME.fullmatch(name) and root.exists(f"{name}/{layout.CONFIG}"):
        return root.sub(name)
    if NAME.fullmatch(name) and (owner := preparer(root.sub(name))) is not None:
        if prepared:
            return root.sub(name)
        raise ConfigError(
            f"{root.uri}/{name} is no run yet: {owner.sentence(StoreClock(root)())}, checks what it needs. Wait until"
            f" {command('status', root.sub(name))} says that it trains."
        )
    if NAME.fullmatch(name) and (kept := kept_settings(root.sub(name))):
        raise ConfigError(f"{root.uri}/{name} has lost its {layout.CONFIG}. {kept}")
    names = runs(root)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"there is no run {shown(name)} in {root.uri}.{hint} Runs there: {', '.join(names) or 'none'}.")


def runs(store: Store, *, prepared: bool = False) -> list[str]:
    """Return names of the runs in `store`, sorted. With `prepared` those that a start prepares are included."""
    names = [name for name in store.children()[0] if NAME.fullmatch(name)]
    with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:
        found = list(pool.map(lambda name: is_there(store.sub(name), prepared=prepared), names))
    return list(compress(names, found))


def is_there(folder: Store, *, prepared: bool = True) -> bool:
    """Return whether the folder is a run's. With `prepared` a run that a start prepares counts too."""
    return folder.exists(layout.CONFIG) or (prepared and preparer(folder) is not None)
