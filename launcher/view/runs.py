"""The runs of a store, by name: a folder that holds a configuration is a run."""

import difflib

from trainer.errors import ConfigError
from trainer.run import layout
from trainer.store import Store, open_store


def find_run(run: str, store: str) -> Store:
    """The folder of `run`, a name in `store`, or a full URI or path.

    Raises `ConfigError`, naming the runs there are, when there is no such run.
    """
    parent, _, name = run.rstrip("/").rpartition("/") if "/" in run else (store, "", run)
    root = open_store(parent)
    folder = root.sub(name)
    if name and folder.exists(layout.CONFIG):
        return folder
    names = runs(root)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"there is no run {name!r} in {root.uri}.{hint} Runs there: {', '.join(names) or 'none'}.")


def runs(store: Store) -> list[str]:
    """Names of the runs in `store`, sorted."""
    return [name for name in store.children()[0] if store.exists(f"{name}/{layout.CONFIG}")]
