"""Whether the folder that a run's store is in can be that of a run on other machines."""

import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from trainer.config import Config
from trainer.config.paths import local_path
from trainer.errors import ConfigError

_OF_ONE_MACHINE = "ext2 ext3 ext4 xfs btrfs zfs overlay tmpfs ramfs f2fs apfs vfat exfat".split()
"""Types of file systems that no other machine has; an export of one by NFS has another type there, and its server may
say file://.
"""


def warn_of_place(config: Config, log: Callable[[str], None]) -> None:
    """Say of a store in a folder that other machines must have it, and that they seldom do where it holds temporary
    files.
    """
    folder = _folder(config)
    if folder is None:
        return
    own = {Path(place).resolve() for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")}
    if any(folder.is_relative_to(place) for place in own):
        log(
            f"Attention: run.store: {folder} is among this machine's temporary files, which other machines do not see"
            " and a reboot removes. Give a folder of a file system that all machines of the run share, or a bucket."
            " Example: s3://bucket/runs."
        )
    else:
        log(f"run.store is the folder {folder}: every machine of the run must have it under this path")


def check_shared(config: Config, address: str) -> None:
    """Raises `ConfigError` where a cluster at `address` is of other machines for certain, and the store is on a disk of
    this one.
    """
    folder = _folder(config)
    if folder is None or config.run.store.startswith("file://") or not _is_elsewhere(address):
        return
    kind = file_system(folder)
    if kind in _OF_ONE_MACHINE:
        raise ConfigError(
            f"run.store: {folder} is on a disk of this machine ({kind}), and the cluster at {address} is of others,"
            " which do not see it. Give a bucket or a folder of a file system that all of them share; where they do"
            f" share this one, say so: run.store=file://{folder}."
        )


def file_system(folder: Path, mounts: str | None = None) -> str | None:
    """The type of the file system that `folder` is on, by `mounts` as /proc/mounts has them; None where that is not
    told.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
    points = [line.split()[1:3] for line in mounts.splitlines() if len(line.split()) > 2]
    above = [(len(at), kind) for at, kind in points if folder.is_relative_to(at.replace("\\040", " "))]
    return max(above, key=lambda point: point[0])[1] if above else None


def _folder(config: Config) -> Path | None:
    """The folder of the store; None for a bucket."""
    store = config.run.store
    if "://" in store and not store.startswith("file://"):
        return None
    return local_path(store.removeprefix("file://"), "run.store").resolve()


def _is_elsewhere(address: str) -> bool:
    """Whether HOST:PORT, or a URL of it, is an address that this machine does not have; a name that nobody knows may be
    any.
    """
    host = address.rpartition("://")[2].partition("/")[0].rpartition(":")[0].strip("[]")
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)} if host else set[str]()
    except OSError:
        return False
    return bool(found) and not any(map(_is_own, found))


def _is_own(address: str) -> bool:
    """A socket can be bound to the addresses of this machine alone."""
    try:
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError:
        return False
    return True
