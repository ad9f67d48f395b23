"""Paths that a person gave, on a command line or in a setting."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from trainer.errors import ConfigError, shown


def absolute_path(text: str, setting: str) -> Path:
    """`text` as an absolute path, a `~` in it replaced; `setting` is what messages call it.

    Raises:
        ConfigError: it is empty, or nobody's home is called so.
    """
    if not text:
        raise ConfigError(f"{setting}: empty. Give a path.")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{setting}: {shown(text)} cannot be a path on this machine: {error}") from error


def local_path(text: str, setting: str) -> Path:
    """`absolute_path` of what may be looked at.

    Raises:
        ConfigError: it is too long, or lies in a folder that is closed to this user.
    """
    path = absolute_path(text, setting)
    try:
        path.exists()
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"{setting}: {shown(text)} cannot be a path on this machine: {reason}.") from error
    return path


def users_folder(variable: str, below_home: str) -> Path:
    """Return Capstan's folder in the one that the environment variable names, such as XDG_CACHE_HOME.

    `below_home` is where that folder usually is in the home directory. Raises `ConfigError` if the user has none.
    """
    if given := os.environ.get(variable):
        return Path(given) / "capstan"
    try:
        return Path.home() / below_home / "capstan"
    except RuntimeError as error:
        raise ConfigError(
            f"HOME: not set, and this user has no home directory on this machine. Set it, or {variable}, to a folder"
            " that can be written."
        ) from error


class NoFile(OSError):
    """A pipe, a device or a socket, on which a read might wait for ever or never come to an end."""


def check_file(path: Path) -> None:
    """Raises `NoFile` for what is none."""
    try:
        mode = path.stat().st_mode
    except OSError:  # the read will say why
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise NoFile("it is no file, but a pipe, a device or a socket")


def check_files(paths: Iterable[Path], setting: str) -> None:
    """Raises `ConfigError` where one of them, which are read by their names, is no file. `setting` is what messages
    call their folder.
    """
    for path in paths:
        try:
            check_file(path)
        except OSError as error:
            raise ConfigError(f"{setting}: {path} cannot be read: {error}. Remove it.") from error


def text_lines(text: str, setting: str) -> list[tuple[int, str]]:
    """The lines of the text file at `text` that are not empty, each with its number, from 1.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        lines = local_path(text, setting).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: {text!r} cannot be read: {error}.") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def file_system(folder: Path, mounts: str | None = None) -> str | None:
    """Return the type of the file system that the resolved `folder` is on. `mounts` has the form of /proc/mounts.

    Of several at one place the last counts, which hides the others. None if it cannot be told.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
    points = [line.split()[1:3] for line in mounts.splitlines() if len(line.split()) > 2]
    above = [(len(at), kind) for at, kind in points if folder.is_relative_to(at.replace("\\040", " "))]
    return max(reversed(above), key=lambda point: point[0])[1] if above else None
