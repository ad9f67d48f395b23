"""A run's folder in its store, and the configuration in it. Everybody reads the configuration here."""

import os
import shlex
from collections.abc import Callable, Sequence

from trainer.config import Config, assignment, parse_config, unsaid
from trainer.errors import ConfigError, NotFound
from trainer.run import layout
from trainer.store.store import Store, open_run_store, open_store


def run_folder(config: Config) -> Store:
    return open_run_store(config).sub(config.run.name)


def store_of(folder: Store) -> Store:
    """Return the store that a run's folder is in, with the compiled data and the other runs."""
    return open_store(folder.uri.rpartition("/")[0])


def name_of(folder: Store) -> str:
    """Return the name that a run has by its folder, whatever its configuration calls it."""
    return folder.uri.rpartition("/")[2]


def command(verb: str, folder: Store, argument: str = "") -> str:
    """Return the command that does `verb` with the run, in backquotes.

    It names the store if the run's name alone would not find the run.
    """
    store, _, name = folder.uri.rpartition("/")
    usual = open_store(os.environ.get("CAPSTAN_STORE", "runs")).uri
    where = "" if store == usual else f" --store {shlex.quote(store.removeprefix('file://'))}"
    return f"`capstan {verb} {name}{argument and f' {argument}'}{where}`"


def submitted_config(folder: Store) -> Config:
    """Return a job's configuration: the one that it was submitted with until its turn comes, then the run's."""
    return run_config(folder, document=layout.SUBMITTED if folder.exists(layout.SUBMITTED) else layout.CONFIG)


def run_config(
    folder: Store,
    overrides: Sequence[str] = (),
    document: str = layout.CONFIG,
    say: Callable[[str], None] = unsaid,
) -> Config:
    """Return the configuration of the run in `folder`, with dotted `overrides`.

    `say` gets the values that these replace, as in `load_config`.

    The folder's own place and name replace `run.store` and `run.name`, because a run may have been moved, or copied to
    another name. Raises `ConfigError` if the folder holds no configuration or a wrong one, or if an override would lead
    to another run.
    """
    key = f"{folder.uri}/{document}"
    store, _, name = folder.uri.removeprefix("file://").rpartition("/")
    try:
        text = folder.get(document).decode()
    except NotFound as error:
        raise ConfigError(
            f"{folder.uri} holds no {document}, so it is no run. Give a run's name or its URI."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key} is not UTF-8 text ({error.reason} at byte {error.start}). Restore it.") from error
    for override in overrides:
        setting, _, value = override.partition("=")
        if setting in ("run", "run.name", "run.store"):
            raise ConfigError(
                f"{setting}: {value!r} would be another run than {folder.uri}, which goes on in its own folder. Leave"
                " it out; a copy of the folder is a run of its own."
            )
    return parse_config(text, [assignment("run.store", store), assignment("run.name", name), *overrides], key, say)
