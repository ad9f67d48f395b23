"""Taking a run's folder for a start, and giving it back as it was when nothing comes of the start."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.start import snapshot
from launcher.start.check import check_idle, check_name
from trainer.config import Config, dump_config
from trainer.errors import AlreadyExists, ConfigError, NotFound
from trainer.run import layout
from trainer.run.folder import run_config, run_folder
from trainer.run.owner import own
from trainer.run.records import generations
from trainer.run.settings import changes
from trainer.store import Store

_WRITTEN = (layout.CONFIG, layout.SNAPSHOT, layout.STOP, layout.OWNER, layout.DRIVER_LOG, layout.SLURM_SCRIPT)
"""The keys that a start writes or takes away before its first rank."""


@contextmanager
def claimed(
    config: Config,
    *,
    by: str,
    resume: bool,
    code: snapshot.Snapshot | None,
    log: Callable[[str], None],
    restarted: bool = False,
    waits: bool = False,
) -> Iterator[Store]:
    """The run's folder made this configuration's for the body; as it was before, where the body fails before a rank began.

    Writes config.yaml and the snapshot of the code, says who has the run (`by`; with `waits` a job that it will be
    submitted as), and takes back an earlier stop request; `log` gets what a resume changes. When several claims of a
    name race, one succeeds.
    """
    run = run_folder(config)
    known = generations(run)
    written = (*_WRITTEN, *map(layout.settings, known[-1:]))
    before = _contents(run, written)
    if resume:
        old = run_config(run)
        _keep_settings(run, known, old)
        for change in changes(old.model_dump(mode="json"), config.model_dump(mode="json")):
            log(change.sentence())
        run.put(layout.CONFIG, dump_config(config).encode())
    elif not (restarted and layout.CONFIG in before):
        _create(run, config)
    try:
        own(run, by, waits=waits)
        if code is not None:
            run.put(layout.SNAPSHOT, code.archive(dump_config(config)))
        run.delete(layout.STOP)
        yield run
    except BaseException:
        if generations(run) == known:
            _restore(run, before, written)
        elif resume and not run.exists(layout.settings(max(generations(run)))):
            _restore(run, before, (layout.CONFIG, layout.SNAPSHOT))  # its ranks refused before they trained with it
        raise


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


def _create(run: Store, config: Config) -> None:
    if run.exists(layout.CONFIG):
        check_idle(run, resume=False)
        check_name(run)
        run.delete(layout.CONFIG)  # its start died before it had anything to lose
    try:
        run.create(layout.CONFIG, dump_config(config).encode())
    except AlreadyExists as error:
        raise ConfigError(
            f"run.name: somebody else has just claimed {run.uri}. A new run needs another name."
        ) from error


def _keep_settings(run: Store, known: list[int], config: Config) -> None:
    """An earlier version did not keep what each start trained with, so this is written before the settings change."""
    if known and not run.list(layout.SETTINGS):
        run.put(layout.settings(known[-1]), dump_config(config).encode())


def _contents(run: Store, keys: tuple[str, ...]) -> dict[str, bytes]:
    found = dict[str, bytes]()
    for key in keys:
        with suppress(NotFound):
            found[key] = run.get(key)
    return found


def _restore(run: Store, before: dict[str, bytes], keys: tuple[str, ...]) -> None:
    for key in keys:
        if key in before:
            run.put(key, before[key])
        else:
            run.delete(key)
