"""The owner of a run: the process or the submitted job that has it, known from keys in its folder.

Every start that takes a run creates the next of the keys owners/000001.json, owners/000002.json and so on. The start
with the highest number has the run. When several starts take a run at once, only one of them can create the key. A
start that has lost the run sees a higher number than its own. The owner refreshes its key as long as it lives, and
marks it as ended when it ends in order. Records do not tell whether a run is alive: a compilation, a large base or a
long step writes none for minutes. An owner costs one request every `BEAT_SECONDS`. A start that has not taken its run
yet announces itself by the key `layout.PREPARING`.
"""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from threading import Lock

from trainer.errors import AlreadyExists, ConfigError, NotFound, StorageError, Superseded
from trainer.processes.children import Siblings
from trainer.run import layout
from trainer.run.background import Every
from trainer.run.folder import name_of
from trainer.run.records import generations
from trainer.store.store import Entry, Store

_TRIES = 3  # somebody else may take the key first
_ALIKE_SECONDS = 5.0
"""Clocks that differ by less are one: stores stamp whole seconds, and a request takes its time."""


class StoreClock:
    """The time in seconds since 1970, by the clock of the store that `folder` is in.

    The first call writes a key for a moment, and so does the first call after this machine's clock was set. If nothing
    may be written, the machine's clock is used instead.
    """

    def __init__(self, folder: Store) -> None:
        self._folder, self._measuring = folder, Lock()
        self._ahead, self._booted = 0.0, -math.inf

    def __call__(self) -> float:
        with self._measuring:
            booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
            if abs(booted - self._booted) > _ALIKE_SECONDS:
                self._ahead, self._booted = _ahead(self._folder.failing_fast()), booted
        return time.time() + self._ahead


def _ahead(folder: Store) -> float:
    """Return the seconds that the store's clock is ahead of this machine's."""
    with suppress(StorageError):
        for _ in range(_TRIES):
            before = time.time()
            folder.put(layout.CLOCK, b"")
            with suppress(NotFound):
                written = folder.head(layout.CLOCK).modified.timestamp()
                folder.delete(layout.CLOCK)
                found = written - (before + time.time()) / 2
                return found if abs(found) > _ALIKE_SECONDS else 0.0
    return 0.0


BEAT_SECONDS = 30.0
FRESH_SECONDS = 100.0
"""An owner on another machine is taken to live for so long after its last beat."""
_ANEW_SECONDS = 10.0


@dataclass(frozen=True)
class Owner:
    """The process or job that has a run.

    `by` is the command that was given, such as "capstan train". `since` is the time at which it took the run, by its
    machine's clock. `time` is its last beat, by the store's clock. Both are in seconds since 1970.

    `process` is None for a submitted job whose turn has not come yet. A process number has a meaning in one `place`
    only (a boot of a machine and a namespace of it). Together with the time at which the process was `born` it names
    one process. All processes of one submission, or of one torchrun, have the same `group`. `run` is the run's name: an
    owner with another name came with a copy of that run's folder.
    """

    by: str
    host: str
    place: str
    process: int | None
    born: str | None
    since: float
    time: float
    run: str
    group: str | None = None
    ended: bool = False
    output: str | None = None
    """The file on `host` that has what the process says, if it was started without a terminal."""
    starts: int | None = None
    """The number of the run's newest start when the owner took the run. An earlier version's owner has none."""

    @property
    def waits(self) -> bool:
        return self.process is None

    @property
    def is_here(self) -> bool:
        """Whether this process can see the owner's process, so that no clock is needed."""
        return self.place == _place() and self.process is not None and _born(self.process) != _HIDDEN

    def is_alive(self, clock: Callable[[], float]) -> bool:
        """Return whether the owner lives.

        This is exact on the owner's own machine. On other machines an owner counts as alive until it has been silent
        for a while, by the store's `clock`.
        """
        if self.ended:
            return False
        if self.process is None:
            return True
        if self.is_here:
            return self.born is not None and self.born == _born(self.process)
        return clock() - self.time < FRESH_SECONDS

    def sentence(self, now: float) -> str:
        """Describe the owner, such as: `capstan train` (process 4711 on node3), heard of 12 s ago."""
        age = f"{max(0.0, now - self.time):.0f} s ago"
        if self.process is None:
            return f"`{self.by}` on {self.host}, whose job has not begun; submitted {age}"
        return f"`{self.by}` (process {self.process} on {self.host}), heard of {age}"


class Ownership:
    """A run as its owner `number` has it."""

    def __init__(self, folder: Store, number: int, owner: Owner) -> None:
        self.run, self._number, self.owner = folder, number, owner

    @property
    def lost(self) -> bool:
        """Whether another start has taken the run over since."""
        return self.run.exists(layout.owner(self._number + 1))  # a listing may be late, and costs more

    def check(self) -> None:
        """Raise `Superseded` when another start has taken the run over: the run's keys then belong to that start."""
        if self.lost:
            raise Superseded(f"{self.run.uri} has been taken over by another start. This one ends.")

    @contextmanager
    def kept_fresh(self) -> Iterator[None]:
        """Say every `BEAT_SECONDS` that the owner lives, as long as the body runs."""
        # No retries here: the next beat is one, and the end must not wait for a store that is gone.
        impatient = self.run.failing_fast()
        beat = Every(BEAT_SECONDS, lambda: self._write(impatient), "saying who has the run")
        try:
            yield
        finally:
            beat.stop()

    def hand_to(self, process: int, output: Path) -> None:
        """Let a process of this machine have the run, which writes what it says to `output`. It takes the run itself
        once it has begun.
        """
        self.owner = replace(self.owner, process=process, born=_born(process), output=str(output))
        self._write(self.run)

    def end(self) -> None:
        """Let others have the run. If the owner can no longer say so, others soon find out that it is gone."""
        with suppress(StorageError):
            self._write(self.run.failing_fast(), ended=True)

    def _write(self, folder: Store, ended: bool = False) -> None:
        folder.put(layout.owner(self._number), _as_json(replace(self.owner, time=time.time(), ended=ended)))


class OwnerWatch:
    """The owner of a run as another process of the same start sees it: a rank that waits for rank 0.

    `group` is the owner's group, if it is known.
    """

    def __init__(self, folder: Store, group: str | None = None) -> None:
        self._run, self._group, self._clock = folder, group, StoreClock(folder)
        self._seen = False
        self.last_alive = time.monotonic()
        """When it was there last, or this watch began."""

    @property
    def is_unheard(self) -> bool:
        """Whether the owner has not been seen yet."""
        return not self._seen

    def is_gone(self) -> bool:
        """Return whether the owner was there and has certainly ended, by what /proc tells or by its own word.

        An owner that starts again within `_ANEW_SECONDS` does not count as ended. An owner on another machine may only
        be silent.
        """
        owner, now = last_owner(self._run), time.monotonic()
        if owner is None or self._group not in (None, owner.group):
            return False
        if owner.is_alive(self._clock):
            self._seen, self.last_alive = True, now
        return self._seen and (owner.ended or owner.is_here) and now - self.last_alive > _ANEW_SECONDS


def lost_ranks(folder: Store) -> Callable[[int], bool]:
    """Return a function that tells whether the process of a rank has ended, as far as this rank can know.

    It knows rank 0 by the run's owner, and the other ranks by the processes of this machine.
    """
    owner, siblings = OwnerWatch(folder), Siblings()
    return lambda rank: (rank == 0 and owner.is_gone()) or siblings.is_gone(rank)


def newest_number(folder: Store) -> int:
    """Return how often the run has been taken."""
    return _newest(folder)[0]


def read_owner(folder: Store) -> Owner | None:
    """Return the run's last owner, alive or not. None if it never had one, or if the last one left it in order."""
    found = last_owner(folder)
    return None if found is None or found.ended else found


def last_owner(folder: Store) -> Owner | None:
    """Return the run's last owner, even if it has ended. None if the run never had one."""
    found = _last(folder)
    return found and found.owner


def _last(folder: Store) -> Ownership | None:
    """Return what `last_owner` does, with that owner's number, even if somebody takes the run meanwhile."""
    number, entry = _newest(folder)
    if entry is None:
        return None
    with suppress(NotFound):  # the run's folder is being deleted
        owner = _parsed(folder.get(entry.key), entry.modified.timestamp(), name_of(folder))
        return Ownership(folder, number, owner) if owner.run == name_of(folder) else None
    return None


def _newest(folder: Store) -> tuple[int, Entry | None]:
    """Return the last owner's number and key; 0 and None if the run was never taken.

    A listing may be late, so an owner that is not listed yet is asked for by its number.
    """
    found = [(number, entry) for entry in folder.list(layout.OWNERS) if (number := layout.owner_of(entry.key))]
    number, entry = max(found, key=lambda pair: pair[0], default=(0, None))
    with suppress(NotFound):
        while True:
            entry = folder.head(layout.owner(number + 1))
            number += 1
    return number, entry


def take(
    folder: Store, by: str, after: int, *, group: str | None = None, waits: bool = False, place: str | None = None
) -> Ownership:
    """Take the run for this process, or with `waits` for the job that this process is about to submit.

    `after` is the `newest_number` that the decision to take the run rests on. If the caller passes a `place` of its
    own, the owner outlives this process. Raises `ConfigError` when somebody has taken the run since.
    """
    now, process = time.time(), None if waits else os.getpid()
    born = _born(os.getpid())
    owner = Owner(by, socket.gethostname(), place or _place(), process, born, now, now, name_of(folder), group)
    owner = replace(owner, starts=max(generations(folder), default=0))
    try:
        folder.create(layout.owner(after + 1), _as_json(owner))
    except AlreadyExists as error:
        raise ConfigError(f"run.name: somebody else has just taken {folder.uri}. Look at its status first.") from error
    return Ownership(folder, after + 1, owner)


def ended_waiting(folder: Store) -> bool:
    """Release the run if it belongs to a submitted job whose turn has not come. Returns whether that was so."""
    return _end_if(folder, lambda owner: owner.waits)


def end_group(folder: Store, group: str) -> None:
    """Release a run that a process of `group` had and did not release itself."""
    _end_if(folder, lambda owner: owner.group == group)


def _end_if(folder: Store, condition: Callable[[Owner], bool]) -> bool:
    found = _last(folder)
    if found is None or found.owner.ended or not condition(found.owner):
        return False
    found.end()
    return True


@contextmanager
def preparing(folder: Store, by: str) -> Iterator[None]:
    """Say in the folder of a run that this process prepares it, as long as the body runs. The run has no owner yet.

    A store that does not answer is left for the body to find.
    """
    impatient, now = folder.failing_fast(), time.time()
    owner = Owner(by, socket.gethostname(), _place(), os.getpid(), _born(os.getpid()), now, now, name_of(folder))

    def say() -> None:
        impatient.put(layout.PREPARING, _as_json(owner))

    try:
        if told := not impatient.exists(layout.CONFIG):
            say()
    except StorageError:
        told = False
    beat = Every(BEAT_SECONDS, say, "saying who prepares the run") if told else None
    try:
        yield
    finally:
        if beat is not None:
            beat.stop()
            with suppress(StorageError):
                impatient.delete_alone(layout.PREPARING)


def preparer(folder: Store) -> Owner | None:
    """Return the process that prepares the run, which is not there yet. None if no process does."""
    with suppress(NotFound):
        entry = folder.head(layout.PREPARING)
        found = _parsed(folder.get(layout.PREPARING), entry.modified.timestamp(), name_of(folder))
        return found if found.is_alive(StoreClock(folder)) else None
    return None


def _parsed(data: bytes, written: float, name: str) -> Owner:
    """Return the owner in a key that was `written` at that time by the store's clock.

    An unreadable key still has an owner.
    """
    unknown = Owner("an unreadable owner", "?", "?", 0, None, written, written, name)
    known = {field.name for field in fields(Owner)}
    try:
        found = Owner(**{key: value for key, value in json.loads(data).items() if key in known})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return unknown
    numbers = isinstance(found.time, int | float) and isinstance(found.since, int | float)
    is_process = isinstance(found.process, int | None) and 0 <= (found.process or 0) < 2**31
    is_sound = numbers and is_process and isinstance(found.output, str | None) and isinstance(found.starts, int | None)
    return replace(found, time=written) if is_sound else unknown


def _as_json(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode()


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


_HIDDEN = "hidden"


def _born(process: int) -> str | None:
    """Return when the process began, in clock ticks since the boot.

    None means that it has ended, `_HIDDEN` that /proc does not tell.
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return _HIDDEN if _exists(process) else None
    state, *fields_after = stat.rpartition(")")[2].split()  # proc(5): the name before it may hold anything
    return None if state in "ZX" else fields_after[18]


def _exists(process: int) -> bool:
    """Return whether the process exists, whoever runs it: /proc may be mounted so that others' are hidden (hidepid)."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False  # it was one of ours, which /proc would show, so it has ended
