"""A run before it starts: its settings checked, its paths made absolute, its name claimed, its code kept.

`capstan train` and `capstan submit` share this. Everything that can be wrong without data or a rank is found here, before
torch is imported or a scheduler is asked.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.start import snapshot
from launcher.view.status import SILENT_SECONDS, read_status
from trainer.base.check import check_base
from trainer.base.locate import Base, resolve_base
from trainer.checkpoint.listing import committed_steps
from trainer.config import Config, assignment, dump_config, override
from trainer.config.secrets import refuse_secrets
from trainer.errors import AlreadyExists, ConfigError, NothingToResume
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.store import Store
from trainer.tuning.method import check_tuning
from trainer.zero.policy import build_deepspeed_config


def anchored(config: Config) -> Config:
    """`config` with its relative local paths made absolute: ranks, and a later resume, may have another directory."""

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    changes: dict[str, Any] = {"run.store": absolute(config.run.store)}
    for key, path in (("model.base", config.model.base), ("sharding.deepspeed", config.sharding.deepspeed)):
        if Path(path).expanduser().exists():
            changes[key] = absolute(path)
    if config.data.template:
        changes["data.template"] = absolute(config.data.template)
    for what, sources in (("train", config.data.train), ("eval", config.data.eval)):
        moved = [source.model_copy(update={"path": absolute(source.path)}).model_dump() for source in sources]
        changes[f"data.{what}"] = moved
    return override(config, *(assignment(key, value) for key, value in changes.items()))


def check(config: Config, *, resume: bool, restarted: bool = False) -> Base:
    """Everything that can be told without data or ranks; changes nothing. Returns the base.

    `restarted`: whoever started this process did so before, so the name is this run's already.

    Raises:
        ConfigError: the name is taken, a setting holds a secret, or the base does not fit the settings.
        NothingToResume: `resume`, and nothing is committed.
    """
    refuse_secrets(config)
    base = resolve_base(config.model)
    check_base(base, config)
    check_tuning(config, base.architecture)
    build_deepspeed_config(config, world_size=config.cluster.most_workers or 1, accumulation=1, on_gpu=False)
    run = run_folder(config)
    if resume and not committed_steps(run):
        raise NothingToResume(f"{run.uri} has no committed checkpoint. Start it with `capstan train`.")
    if not (resume or restarted) and _taken_by_another(run):
        raise _taken(config)
    return base


def claim(config: Config, *, resume: bool, code: snapshot.Snapshot | None, restarted: bool = False) -> Store:
    """Make the run's folder this configuration's; returns the folder. Of several racing claims of a name one succeeds.

    Writes config.yaml and the snapshot of the code, and takes back an earlier stop request.
    """
    run = run_folder(config)
    if resume:
        run.put(layout.CONFIG, dump_config(config).encode())  # with what this resume changed
    elif not (restarted and run.exists(layout.CONFIG)):
        _create(run, config)
    if code is not None:
        run.put(layout.SNAPSHOT, code.archive(dump_config(config)))
    run.delete(layout.STOP)
    return run


def release(run: Store) -> None:
    """Give a claimed name back: nothing was started under it."""
    run.delete(layout.CONFIG)
    run.delete(layout.SNAPSHOT)
    run.delete(layout.DRIVER_LOG)


def keep_code(log: Callable[[str], None]) -> snapshot.Snapshot | None:
    """The snapshot of the current directory's checkout, for a run that goes on without one where it is too large."""
    try:
        taken = snapshot.take(Path.cwd())
    except ConfigError as error:
        log(f"no copy of the code is kept with the run: {error}")
        return None
    if left_out := taken.left_out():
        log(f"the copy of the code that is kept with the run: {left_out}")
    return taken


def _taken_by_another(run: Store) -> bool:
    """A name is taken unless its run ended before it had anything to lose."""
    if not run.exists(layout.CONFIG):
        return False
    status = read_status(run)
    ended = status.state in ("failed", "stopped", "silent") or (status.quiet_seconds or 0) > SILENT_SECONDS
    return not ended or bool(committed_steps(run))


def _create(run: Store, config: Config) -> None:
    if run.exists(layout.CONFIG) and not _taken_by_another(run):
        run.delete(layout.CONFIG)
    try:
        run.create(layout.CONFIG, dump_config(config).encode())
    except AlreadyExists as error:
        raise _taken(config) from error


def _taken(config: Config) -> ConfigError:
    name = config.run.name
    return ConfigError(
        f"run.name: {name!r} exists in {config.run.store}. `capstan resume {name}` continues it; a new run needs another name."
    )
