"""What a run was started from: the tracked files of the user's git checkout, their git state, the installed versions.

`snapshot.tar.zst` in the run's folder holds

    config.yaml        the configuration, every default written out
    requirements.txt   the installed distributions, as `name==version` lines
    git.json           commit, branch, remote, and whether files differ from the commit
    git.diff           that difference
    code/...           the tracked files as they are, changes included

Outside a git checkout there is no git.json, no git.diff and no code.
"""

import io
import json
import subprocess
import tarfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from pathlib import Path

import zstandard

from trainer.errors import ConfigError

MOST_BYTES = 64 * 2**20
"""Of the tracked files, uncompressed: code, not data."""
_GIT_SECONDS = 60


@dataclass(frozen=True)
class GitState:
    """Where the code was; `dirty` means that tracked files differ from `commit`."""

    commit: str | None
    branch: str | None
    remote: str | None
    dirty: bool


@dataclass(frozen=True)
class Snapshot:
    """The tracked `files` (relative to `root`) of a checkout; without one, nothing but the installed versions."""

    root: Path | None = None
    files: list[Path] = field(default_factory=list)
    git: GitState | None = None
    diff: str = ""
    size: int = 0

    def archive(self, config: str) -> bytes:
        """The .tar.zst, holding `config` as config.yaml. The same content gives the same bytes."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            _add(tar, "config.yaml", config.encode())
            _add(tar, "requirements.txt", _installed().encode())
            if self.root is not None and self.git is not None:
                _add(tar, "git.json", json.dumps(asdict(self.git), indent=1).encode())
                _add(tar, "git.diff", self.diff.encode())
                for path in self.files:
                    tar.add(self.root / path, f"code/{path}", recursive=False, filter=_without_owner)
        return zstandard.compress(packed.getvalue(), 9)

    def sentence(self) -> str:
        if self.root is None or self.git is None:
            return "no git checkout here: the configuration and the installed versions"
        changed = " with changes" if self.git.dirty else ""
        commit = (self.git.commit or "no commit yet")[:12]
        return f"{len(self.files)} tracked files of {self.root} ({commit}{changed}, {self.size / 1e6:.1f} MB)"


def take(directory: Path) -> Snapshot:
    """Look at the git checkout that `directory` is in, if it is in one.

    Raises:
        ConfigError: its tracked files are larger than `MOST_BYTES`.
    """
    top = _git(directory, "rev-parse", "--show-toplevel")
    if top is None:
        return Snapshot()
    root = Path(top.strip())
    listed = _git(root, "ls-files", "-z") or ""
    # A tracked file may be deleted, a submodule is a folder, and a link may lead anywhere.
    files = [path for name in listed.split("\0") if name and _is_plain(root / (path := Path(name)))]
    sizes = {path: (root / path).stat().st_size for path in files}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = ", ".join(
            f"{path} ({sizes[path] / 1e6:.0f} MB)" for path in sorted(files, key=sizes.__getitem__)[:-4:-1]
        )
        raise ConfigError(
            f"the tracked files of {root} are {total / 1e6:.0f} MB, a snapshot takes at most {MOST_BYTES / 1e6:.0f} MB. "
            f"The largest are {largest}. Leave data out of git, or start the run from another folder."
        )
    commit, branch, remote = (
        (_git(root, *arguments) or "").strip() or None
        for arguments in (
            ("rev-parse", "HEAD"),
            ("branch", "--show-current"),
            ("remote", "get-url", "origin"),
        )
    )
    diff = _git(root, "diff", "HEAD") or ""
    return Snapshot(root, sorted(files), GitState(commit, branch, remote, dirty=bool(diff)), diff, total)


def unpack(archive: bytes, directory: Path) -> Path:
    """Lay a snapshot's content out in `directory`; returns the folder of its code, which may be missing."""
    with tarfile.open(fileobj=io.BytesIO(zstandard.ZstdDecompressor().decompressobj().decompress(archive))) as tar:
        tar.extractall(directory, filter="data")
    return directory / "code"


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints; None where git or a checkout is missing, or the question has no answer."""
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, timeout=_GIT_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _installed() -> str:
    found = {f"{dist.metadata['Name']}=={dist.version}" for dist in distributions() if dist.metadata["Name"]}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member
