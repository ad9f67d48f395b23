"""The owner of a run: the key OWNER in its folder, which the process that started it keeps fresh as long as it lives.

Records do not tell whether a run is alive: a compilation, a large base or a long step leaves none for minutes. A
command that is about to start a run looks here first. At rest this costs two requests every `BEAT_SECONDS`.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trainer.errors import NotFound, StorageError
from trainer.run import layout
from trainer.run.background import Every
from trainer.store import Store

BEAT_SECONDS = 30.0
FRESH_SECONDS = 100.0
"""An owner on another machine is taken to live for so long after its last beat."""


@dataclass(frozen=True)
class Owner:
    """`by` is what was started, such as "capstan train"; `time` is its last beat, in seconds since 1970.

    `process` is None for a submitted job whose turn has not come yet. A process number means something in one `place`
    only (a boot of a machine and a namespace of it), and names one process together with when that was `born`.
    """

    by: str
    host: str
    place: str
    process: int | None
    born: str | None
    time: float

    @property
    def waits(self) -> bool:
        return self.process is None

    def is_alive(self, now: float) -> bool:
        """Exact where the owner runs; on other machines an owner lives until it has not been heard of for a while."""
        if self.process is None:
            return True
        if self.place == _place():
            return self.born == _born(self.process)
        return now - self.time < FRESH_SECONDS

    def sentence(self, now: float) -> str:
        """Such as: `capstan train` (process 4711 on node3), heard of 12 s ago."""
        age = f"{max(0.0, now - self.time):.0f} s ago"
        if self.process is None:
            return f"`{self.by}` on {self.host}, whose job has not begun; submitted {age}"
        return f"`{self.by}` (process {self.process} on {self.host}), heard of {age}"


def read_owner(run: Store) -> Owner | None:
    """The run's last owner, alive or not; None where it never had one, or the last one left it in order."""
    with suppress(NotFound):
        return Owner(**json.loads(run.get(layout.OWNER)))
    return None


def own(run: Store, by: str, *, waits: bool = False) -> Owner:
    """Make the run this process's own, or with `waits` that of the job which this process is about to submit."""
    process = None if waits else os.getpid()
    owner = Owner(by, socket.gethostname(), _place(), process, _born(os.getpid()), time.time())
    _write(run, owner)
    return owner


def end_waiting(run: Store) -> bool:
    """Whether the run was that of a submitted job whose turn had not come; from now on it is nobody's."""
    owner = read_owner(run)
    if owner is None or not owner.waits:
        return False
    run.delete(layout.OWNER)
    return True


@contextmanager
def owning(run: Store, by: str) -> Iterator[None]:
    """Have the run as long as the body lasts, or until somebody else takes it over."""
    owner = own(run, by)
    # Without retries: the next beat is one, and the end must not wait for a store that is gone.
    impatient = run.failing_fast()
    beat = Every(BEAT_SECONDS, lambda: _beat(impatient, owner), "saying who has the run")
    try:
        yield
    finally:
        beat.stop()
        with suppress(StorageError):  # an owner that is gone is known to be gone
            if _is_own(run, owner):
                run.delete(layout.OWNER)


def _beat(run: Store, owner: Owner) -> None:
    if _is_own(run, owner):
        _write(run, replace(owner, time=time.time()))


def _is_own(run: Store, owner: Owner) -> bool:
    found = read_owner(run)
    return found is not None and replace(found, time=owner.time) == owner


def _write(run: Store, owner: Owner) -> None:
    run.put(layout.OWNER, json.dumps(asdict(owner)).encode())


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _born(process: int) -> str | None:
    """When the process began, in clock ticks since the boot; None when it has ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()  # proc(5): the name before it may hold anything
    return None if state in "ZX" else fields[18]
