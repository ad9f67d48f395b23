"""Runs Python in an environment that came as one archive (launcher/start/environment.py packs it).

    python -m launcher.start.carried run RUN NAME FOLDER ARGUMENT ...    becomes Python with these arguments
    python -m launcher.start.carried unpack STORE NAME FOLDER RUN

The first process on a machine starts the second command, and the others wait for it. It is a process apart, because Ray
kills a worker that has not come within a minute. If the environment cannot be used, the run's records say why. Below
FOLDER, on the machine's own disk, lie

    capstan-environments-<user>/<name>/          the environment; its file READY is written last
    capstan-environments-<user>/<name>.lock      locked while the environment is unpacked or removed

READY holds the id of the machine's boot: after a crash the disk may have lost what had been written. A process holds a
lock of the environment's folder for as long as it lives. An environment that no process has is removed when it has not
been used for a week, or when another one needs the room.

Until the archive has to be unpacked this imports nothing but the standard library, as every rank of every start does.
"""

import fcntl
import hashlib
import io
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

TEMPORARY = "-"
"""Stands for the machine's temporary folder."""
READY = "READY"
_UNUSED_SECONDS = 7 * 24 * 3600.0
_LONGEST_SHEBANG = 127  # of Linux, with the two characters #!
_PARTS_AHEAD = 4


def become(run: str, name: str, folder: str, *arguments: str) -> None:
    """Become the environment's Python. Raises `CapstanError` if the archive cannot be used on this machine."""
    home = held(run.rpartition("/")[0], name, folder, run)
    os.environ["PATH"] = f"{home / 'bin'}:{os.environ.get('PATH', os.defpath)}"
    os.environ["VIRTUAL_ENV"] = str(home)
    python = str(home / "bin" / "python")
    os.execv(python, [python, *arguments])


def held(store: str, name: str, folder: str, *run: str) -> Path:
    """Return the environment's folder. This process holds a lock of it from now on, and so does what it becomes."""
    home = _place(folder) / name
    while True:
        with suppress(FileNotFoundError):
            lock = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if is_whole(home):
                os.set_inheritable(lock, True)
                os.utime(home / READY)
                return home
            os.close(lock)
        safe = ["-P"] if sys.flags.safe_path else []
        command = [sys.executable, *safe, "-m", "launcher.start.carried", "unpack", store, name, folder, *run]
        # Not of trainer.processes.children, as it goes on when this process is killed.
        if code := subprocess.run(command, stdin=subprocess.DEVNULL, start_new_session=True).returncode:
            sys.exit(code)


def unpack(store: str, name: str, folder: str) -> None:
    """Unpack the environment, unless another process has done so while this one waited for its lock."""
    place = _place(folder)
    with (place / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_whole(place / name):
            _unpack(store, name, place / name)


def _place(folder: str) -> Path:
    """Return the folder of this user's environments in `folder`. It is made if it is missing.

    In a folder that everybody may write to, somebody else could have made one of that name.
    """
    place = Path(tempfile.gettempdir() if folder == TEMPORARY else folder) / f"capstan-environments-{os.getuid()}"
    with suppress(OSError):
        place.mkdir(mode=0o700)
    try:
        found = place.lstat()
    except OSError as error:
        raise _refused(f"the folder {place.parent} cannot be used on this machine ({error})") from error
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise _refused(f"{place} is not a folder that you alone may write to, so nothing in it is run. Remove it")
    return place


def is_whole(home: Path) -> bool:
    """Return whether the environment was unpacked to its end since this machine has started."""
    with suppress(OSError):
        return (home / READY).read_text() == _boot()
    return False


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _refused(why: str) -> Exception:
    from trainer.errors import ConfigError

    return ConfigError(
        f"cluster.environment: archive: {why}. The folder is cluster.slurm.local_dir, and with Ray the machine's"
        " temporary folder (TMPDIR)."
    )


def _unpack(uri: str, name: str, home: Path) -> None:
    from trainer.run import layout
    from trainer.store.store import open_store, read_json

    store = open_store(uri)
    known: dict[str, Any] = read_json(store, layout.environment(name))
    _check_python(known)
    began = time.monotonic()
    shutil.rmtree(home, ignore_errors=True)
    _make_room(home, known["bytes"])
    try:
        home.mkdir(mode=0o700)
        _extract(_read(store, known), home, f"{store.uri}/{known['archive']}", known["sha256"])
        _relocate(home, known)
    except OSError as error:
        raise _refused(f"it cannot be unpacked into {home} ({error})") from error
    _check_runs(home)
    (home / READY).write_text(_boot())
    took = time.monotonic() - began
    print(f"capstan: unpacked {known['files']:,} files of the environment into {home} in {took:.0f} s", file=sys.stderr)


def this_python() -> dict[str, str]:
    """Return the facts that must be the same on the machine that unpacks: compiled modules depend on them."""
    return {"python": sys.implementation.cache_tag or "", "platform": sysconfig.get_platform()}


def _check_python(known: dict[str, Any]) -> None:
    from trainer.errors import ConfigError

    for what, here in this_python().items():
        if known[what] != here:
            raise ConfigError(
                f"cluster.environment: archive: the environment was made for {known[what]}, and this machine's"
                f" {sys.executable} is {here}. Its own Python runs what the archive holds, so both must be the same."
                " Give another with cluster.slurm.python, or on a Ray cluster start Ray with one."
            )


def _make_room(home: Path, needed: int) -> None:
    """Remove environments that nobody has used for long, and if that is not enough all that nobody has."""
    if len(f"#!{home}/bin/python") > _LONGEST_SHEBANG:
        raise _refused(f"{home} is too long a path for the first line of a script. Use a shorter folder")
    if os.statvfs(home.parent).f_flag & os.ST_NOEXEC:
        raise _refused(f"{home.parent} lies on a file system that runs no programs (noexec). Use another folder")
    for oldest in (_UNUSED_SECONDS, 0.0):
        for other in [path for path in home.parent.iterdir() if path != home and path.is_dir()]:
            _remove_unused(other, oldest)
        room = shutil.disk_usage(home.parent).free
        if room >= needed:
            return
    raise _refused(
        f"{home.parent} has room for {room / 1e9:,.1f} GB, and the environment has {needed / 1e9:,.1f} GB. Make room,"
        " or use another folder"
    )


def _remove_unused(home: Path, oldest: float) -> None:
    with suppress(OSError), (home.parent / f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody unpacks it now
        lock_of_users = os.open(home, os.O_RDONLY)
        try:
            fcntl.flock(lock_of_users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_whole(home) or time.time() - (home / READY).stat().st_mtime >= oldest:
                (home / READY).unlink(missing_ok=True)
                shutil.rmtree(home)
        finally:
            os.close(lock_of_users)


def _read(store: Any, known: dict[str, Any]) -> Iterator[bytes]:
    """Read the archive part by part, with a few parts on their way."""
    from collections import deque
    from concurrent.futures import Future, ThreadPoolExecutor

    from trainer.store.store import PART_BYTES

    key, size = known["archive"], known["archive_bytes"]
    with ThreadPoolExecutor(_PARTS_AHEAD) as pool:
        coming = deque[Future[bytearray]]()
        for start in range(0, size, PART_BYTES):
            coming.append(pool.submit(store.get_range, key, start, min(start + PART_BYTES, size)))
            if len(coming) == _PARTS_AHEAD:
                yield bytes(coming.popleft().result())
        for part in coming:
            yield bytes(part.result())


class _Stream(io.RawIOBase):
    """A file of parts that come one by one. `sha256` is of what has been read."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._left, self.sha256 = parts, b"", hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = next(self._parts, b"")
            self.sha256.update(self._left)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _extract(parts: Iterator[bytes], home: Path, where: str, sha256: str) -> None:
    """Unpack the archive. Raises `Damaged` if its bytes are not those that were packed."""
    import tarfile

    import zstandard

    from trainer.errors import Damaged

    stream = _Stream(parts)
    try:
        with (
            zstandard.ZstdDecompressor().stream_reader(io.BufferedReader(stream, 2**20)) as content,
            tarfile.open(fileobj=content, mode="r|", bufsize=2**20) as tar,
        ):
            tar.extractall(home, filter="data")
        while stream.read(2**20):
            """Whatever follows the archive's end counts for its hash, too."""
    except (zstandard.ZstdError, tarfile.TarError, EOFError) as error:
        raise Damaged(f"{where} is damaged ({error}). Submit the run again after you have removed it.") from error
    if stream.sha256.hexdigest() != sha256:
        raise Damaged(f"{where} is damaged: its hash is not that of what was packed. Remove it, and submit again.")


def _relocate(home: Path, known: dict[str, Any]) -> None:
    """Make the environment one of this place: its paths, and this machine's Python as its interpreter."""
    places = {old: str(home / new) if new else str(home) for old, new in known["places"].items()}
    move = mover(places)
    for name in known["rewritten"]:
        path = home / name
        path.write_bytes(move(path.read_bytes()))
    base: str = sys._base_executable  # type: ignore[attr-defined]  # what venv.EnvBuilder itself takes
    version = ".".join(map(str, sys.version_info[:3]))
    (home / "pyvenv.cfg").write_text(
        f"home = {Path(base).parent}\ninclude-system-site-packages = false\nversion = {version}\n"
    )
    (home / "bin").mkdir(exist_ok=True)
    for python in ("python", "python3", f"python3.{sys.version_info.minor}"):
        (home / "bin" / python).symlink_to(base)


def mover(places: dict[str, str]) -> Callable[[bytes], bytes]:
    """Return what replaces each path of `places` (old -> new) in a text, where it stands for itself or a parent."""
    longest_first = sorted(places, key=len, reverse=True)  # an environment may lie in a checkout that is carried, too
    pattern = re.compile(b"(?:%s)(?![\\w.-])" % b"|".join(re.escape(os.fsencode(old)) for old in longest_first))
    return lambda text: pattern.sub(lambda found: os.fsencode(places[os.fsdecode(found[0])]), text)


def _check_runs(home: Path) -> None:
    """Raise `ConfigError` unless the environment's Python imports this very program from the environment."""
    from trainer.errors import ConfigError
    from trainer.processes import children

    ask = "import sys, launcher.start.carried as ours; print(sys.prefix); print(ours.__file__)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = children.run([str(home / "bin/python"), "-Pc", ask], env=clean, cwd=home, capture_output=True, text=True)
    told = done.stdout.splitlines()
    if done.returncode or len(told) != 2 or not all(Path(line).is_relative_to(home) for line in told):
        seen = (done.stderr.strip().splitlines() or [" and ".join(told)])[-1]
        raise ConfigError(
            f"cluster.environment: archive: the environment does not run from {home}: {seen}. Set cluster.environment:"
            " shared, or make it with `python -m venv` and install Capstan into it."
        )


def main(verb: str, *arguments: str) -> None:
    """Run as a program. A mistake of the user ends it with one sentence and the error's exit code."""
    runs = {"run": arguments[:1], "unpack": arguments[3:]}[verb]
    try:
        become(*arguments) if verb == "run" else unpack(*arguments[:3])
    except Exception as error:
        from trainer.errors import CapstanError

        if not isinstance(error, CapstanError):
            raise
        print(f"capstan: {error}", file=sys.stderr)
        for run in runs:
            _tell(run, str(error))
        sys.exit(error.exit_code)


def _tell(run: str, why: str) -> None:
    """Record in the run's folder why this machine cannot start it."""
    from trainer.errors import CapstanError
    from trainer.run.owner import ended_waiting
    from trainer.run.records import record_never_begun
    from trainer.store.store import open_store

    with suppress(CapstanError):  # whoever cannot write there has said it in the output alone
        folder = open_store(run).failing_fast()
        record_never_begun(folder, f"{why} ({socket.gethostname()})")
        ended_waiting(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
