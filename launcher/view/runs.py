"""The runs of a store, by name: a folder that holds a configuration is a run."""

import difflib
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import compress

from trainer.errors import ConfigError, shown
from trainer.run import layout
from trainer.store.store import Store, open_store

_REQUESTS_AT_A_TIME = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # a folder that a run's name can be


def find_run(run: str, store: str) -> Store:
    """The folder of `run`, a name in `store`, or a full URI or path.

    Raises `ConfigError`, naming the runs there are, when there is no such run.
    """
    parent, _, name = run.rstrip("/").rpartition("/") if "/" in run else (store, "", run)
    root = open_store(parent)
    if _NAME.fullmatch(name) and root.exists(f"{name}/{layout.CONFIG}"):
        return root.sub(name)
    names = runs(root)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"there is no run {shown(name)} in {root.uri}.{hint} Runs there: {', '.join(names) or 'none'}.")


def runs(store: Store) -> list[str]:
    """Names of the runs in `store`, sorted."""
    names = store.children()[0]
    with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:
        has_config = list(pool.map(lambda name: store.exists(f"{name}/{layout.CONFIG}"), names))
    return list(compress(names, has_config))
