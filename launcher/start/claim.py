"""Takes a run's folder for a start, and gives it back as it was when nothing comes of the start."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from launcher.start import snapshot
from launcher.start.check import check_idle, check_name, check_turn, has_run
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config
from trainer.data.compile.prepare import wait_until_prepared
from trainer.errors import ConfigError, DataError, NotFound
from trainer.processes.children import Siblings
from trainer.run import layout
from trainer.run.folder import changes, keep_as_own, run_config, run_folder
from trainer.run.owner import Ownership, OwnerWatch, newest_number, take
from trainer.run.records import generations
from trainer.store.store import Store, open_run_store

_LOOK_SECONDS = 2.0
# All ranks of a start together look so often at most. A look is a few requests to the store.
_LOOKS_A_SECOND = 64
_WRITTEN = (layout.CONFIG, layout.SUBMITTED, layout.SNAPSHOT, layout.STOP, layout.DRIVER_LOG, layout.SLURM_SCRIPT)
"""The keys that a start writes or takes away before its first rank."""


@contextmanager
def claimed(
    config: Config,
    *,
    by: str,
    resume: bool,
    code: snapshot.Snapshot | None,
    log: Callable[[str], None],
    take_over: bool = False,
    group: str | None = None,
    again: str | None = None,
    waits: bool = False,
) -> Iterator[Ownership]:
    """Take the run for the body, and make its folder this configuration's.

    If the body fails before a rank trained, the folder becomes what it was before.

    This writes config.yaml and the snapshot of the code, and takes back an earlier stop request. `log` gets what a
    resume changes. `by` and `group` are the owner's. A start of a group that was called `again` and has the run goes on
    with it. With `waits` the run is taken for a job that is about to be submitted, and the job claims it again when its
    turn comes. Until then the settings of a resume stand beside config.yaml. When several claims of a run race, one
    succeeds.
    """
    run = run_folder(config)
    number, ours = newest_number(run), has_run(run, again)
    if not (take_over or ours):
        check_idle(run, resume=resume)
    known = generations(run)
    before = _contents(run, _WRITTEN)
    opens = resume or (ours and layout.CONFIG in before)
    if not opens:
        check_name(run)
    owner = take(run, by, number, group=group, waits=waits)
    try:
        _write(run, config, opens=opens, waits=waits, log=log)
        if code is not None:
            run.put(layout.SNAPSHOT, code.archive(dump_config(config)))
        if not ours:
            run.delete(layout.STOP)
        if not (ours or waits):
            run.delete(layout.SUBMITTED)  # its job no longer belongs to the run
        with nullcontext() if waits else owner.kept_fresh():
            yield owner
    except BaseException:
        if not owner.lost:
            _restore(run, before, known)
            owner.end()
        raise
    if not waits:
        owner.end()


def turn(config: Config, submission: str, *, by: str, log: Callable[[str], None]) -> AbstractContextManager[Ownership]:
    """Claim the run, as `claimed` does, for a submitted job of `config` whose turn has come.

    Raises:
        ConfigError: at once, when somebody else has taken the run since it was submitted.
    """
    check_turn(run_folder(config), submission)
    return claimed(config, by=by, resume=True, code=None, log=log, group=submission, again=submission)


def _write(folder: Store, config: Config, *, opens: bool, waits: bool, log: Callable[[str], None]) -> None:
    """Write config.yaml, or the file that stands for it until a submitted job's turn comes."""
    text = dump_config(config).encode()
    keep_as_own(text)
    if opens:
        old = run_config(folder)
        for change in changes(old.model_dump(mode="json"), config.model_dump(mode="json")):
            log(change.sentence())
    if not (opens and waits):  # a new run replaces that of a start that died before it had anything to lose
        folder.put(layout.CONFIG, text)
    if waits:
        folder.put(layout.SUBMITTED, text)


def keep_code(log: Callable[[str], None]) -> snapshot.Snapshot | None:
    """Snapshot the current directory's checkout. A run that goes on does without a snapshot that is too large."""
    try:
        taken = snapshot.take(Path.cwd())
    except ConfigError as error:
        log(f"no copy of the code is kept with the run: {error}")
        return None
    if left_out := taken.left_out():
        log(f"the copy of the code that is kept with the run: {left_out}")
    return taken


def _contents(folder: Store, keys: tuple[str, ...]) -> dict[str, bytes]:
    found = dict[str, bytes]()
    for key in keys:
        with suppress(NotFound):
            found[key] = folder.get(key)
    return found


def _restore(folder: Store, before: dict[str, bytes], known: list[int]) -> None:
    """Put back what was there, except for what ranks have begun with or trained with since."""
    new = [generation for generation in generations(folder) if generation not in known]
    if any(folder.exists(layout.settings(generation)) for generation in new) or (new and layout.CONFIG not in before):
        return
    for key in (layout.CONFIG, layout.SNAPSHOT) if new else _WRITTEN:
        if key in before:
            folder.put(key, before[key])
        else:
            folder.delete(key)


def wait_for_first_rank(config: Config, group: str | None, sleep: Callable[[float], None] = time.sleep) -> None:
    """Return once the run's data is compiled. Meanwhile rank 0 has the run; `group` is its group, if known.

    Raises:
        DataError: rank 0 had the run and has ended, or has not had it for `timeouts.meet` seconds.
    """
    watch, siblings = OwnerWatch(run_folder(config), group), Siblings()

    def wait() -> None:
        if watch.is_gone() or (watch.is_unheard and siblings.is_gone(0)):
            raise DataError(
                "rank 0, which compiles the data, has ended, so this rank ends too. Its own output says why; start all"
                " ranks again."
            )
        if time.monotonic() - watch.last_alive > config.timeouts.meet:
            raise DataError(
                f"timeouts.meet: rank 0, which compiles the data, has not been heard of for {config.timeouts.meet:g} s,"
                " so this rank ends. Its own output says why it did not start."
            )
        sleep(max(_LOOK_SECONDS, int(os.environ.get("WORLD_SIZE", 1)) / _LOOKS_A_SECOND))

    wait_until_prepared(config, resolve_base(config.model), open_run_store(config), wait)
