"""A run's folder in its store, and the configuration in it. Everybody reads the configuration here.

Whoever may write to a store may write a config.yaml there, and a config.yaml names files, programs and code. A bucket
does not tell who wrote an object, and on a shared folder everybody may be the same user of a container. So nothing in
the store says whose run it is. This user's own folder does: it keeps the SHA-256 of every configuration that the user
has started a run with, or has said that they trust. A run that is moved or copied stays the user's. A run whose
config.yaml somebody else has changed does not.

Each start also keeps the settings that it trained with, and records what has changed since the start before.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config import Config, assignment, dump_config, parse_config, unsaid
from trainer.config.paths import users_folder
from trainer.config.reading import read_yaml
from trainer.config.secrets import masked
from trainer.errors import ConfigError, NotFound
from trainer.run import layout
from trainer.store.store import Store, open_run_store, open_store


def run_folder(config: Config) -> Store:
    return open_run_store(config).sub(config.run.name)


def store_of(folder: Store) -> Store:
    """Return the store that a run's folder is in, with the compiled data and the other runs."""
    return open_store(place_of(folder)[0])


def name_of(folder: Store) -> str:
    """Return the name that a run has by its folder, whatever its configuration calls it."""
    return place_of(folder)[1]


def place_of(folder: Store) -> tuple[str, str]:
    """Return the store of the run in `folder`, as a user names it (a path or a URI), and the name of the folder."""
    store, _, name = folder.uri.removeprefix("file://").rpartition("/")
    return store or "/", name


def command(verb: str, folder: Store, argument: str = "") -> str:
    """Return the command that does `verb` with the run, in backquotes.

    It names the store if the run's name alone would not find the run.
    """
    store, name = place_of(folder)
    usual = open_store(os.environ.get("CAPSTAN_STORE") or "runs")
    where = "" if usual.sub(name).uri == folder.uri else f" --store {shlex.quote(store)}"
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
    store, name = place_of(folder)
    try:
        text = folder.get(document).decode()
    except NotFound as error:
        raise ConfigError(
            f"{folder.uri} holds no {document}, so it is no run. {kept_settings(folder) or _ANOTHER_RUN}"
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
    placed = [assignment("run.store", store), assignment("run.name", name)]
    try:
        return parse_config(text, [*placed, *overrides], key, say)
    except ConfigError as error:
        if overrides:
            run_config(folder, document=document)  # says what is wrong with the document itself
            raise
        said = str(error) if str(error).startswith(key) else f"{key} cannot be used: {error}"
        raise ConfigError(f"{said}\n{kept_settings(folder)}".rstrip()) from error


_ANOTHER_RUN = "Give a run's name or its URI."


def kept_settings(folder: Store) -> str:
    """Return a sentence that says where the run's settings are once more; empty if they are nowhere."""
    kept = max((entry.key for entry in folder.list(layout.SETTINGS)), default=None)
    return f"{kept} in the same folder has the settings of its last start: copy it to {layout.CONFIG}." if kept else ""


def keep_as_own(text: bytes) -> None:
    """Note a configuration as this user's.

    If the user's folder cannot be written, as in some containers, nothing is noted.
    """
    with suppress(OSError, ConfigError):
        _users_folder().mkdir(parents=True, exist_ok=True)
        _note(text).touch()


def is_own(folder: Store) -> bool:
    """Return whether this user has started a run with exactly the config.yaml of `folder`, or trusts it."""
    text = folder.get(layout.CONFIG)
    try:
        return _note(text).is_file()
    except (OSError, ConfigError):  # this user has no home directory here
        return False


def _note(text: bytes) -> Path:
    return _users_folder() / hashlib.sha256(text).hexdigest()


def _users_folder() -> Path:
    return users_folder("XDG_STATE_HOME", ".local/state") / "own"


_MOVED = ("run.name", "run.store")
"""Where the run is, which a copied or moved folder changes."""


class SettingChange(NamedTuple):
    """A setting by its dotted name, with its value before and after. Neither shows a secret of an earlier version."""

    setting: str
    old: Any
    new: Any

    def sentence(self) -> str:
        return f"{self.setting} is {json.dumps(self.new)} from now on; it was {json.dumps(self.old)}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[SettingChange]:
    """Return the settings that differ between two configurations, given as trees. The place of the run is left out."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return [
        SettingChange(name, masked(before.get(name), name), masked(after.get(name), name))
        for name in after | before
        if name not in _MOVED and before.get(name) != after.get(name)
    ]


def record_settings(folder: Store, generation: int, config: Config) -> list[SettingChange]:
    """Record what this start trains with.

    Returns what changed since the last start that trained, as far as its settings can be read.
    """
    keys = [entry.key for entry in folder.list(layout.SETTINGS) if entry.key < layout.settings(generation)]
    folder.put(layout.settings(generation), dump_config(config).encode())
    earlier = next(filter(None, (_kept(folder, key) for key in sorted(keys, reverse=True))), None)
    return changes(earlier, config.model_dump(mode="json")) if earlier else []


def _kept(folder: Store, key: str) -> dict[str, Any] | None:
    """Read the settings under `key`; None if they are damaged or gone."""
    with suppress(ConfigError, NotFound):
        if isinstance(tree := read_yaml(folder.get(key), key), dict):
            return tree
    return None


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting of a configuration, given as a tree, as (dotted name, value)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
