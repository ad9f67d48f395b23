"""The code that a run was started from: the tracked files of the user's git checkout, and what belongs to them.

That is their git state, and the installed versions.

`snapshot.tar.zst` in the run's folder holds

    config.yaml        the configuration, every default written out
    requirements.txt   the installed distributions, as `name==version` lines
    git.json           commit, branch, remote, whether files differ from the commit, which are left out or unreadable
    git.diff           that difference
    code/...           the tracked files as they are, changes included, and links as links

Files that look like secrets by their names are left out of the code and of the difference, and the remote has no
credentials. Outside a git checkout there is no git.json, no git.diff and no code.
"""

import io
import json
import os
import re
import subprocess
import tarfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import zstandard

from trainer.config.secrets import without_credentials
from trainer.errors import ConfigError, Damaged, few
from trainer.processes import children

MOST_BYTES = 64 * 2**20
"""How large the tracked files may be together, uncompressed: a snapshot is for code, not for data."""
_MOST_UNPACKED = 8 * MOST_BYTES  # the files, the difference, and the headers of many small files
_NAME_OR_VERSION = re.compile(r"^(Name|Version): (.+)$", re.MULTILINE)
_GIT_SECONDS = 60
# Names, in lower case, of files and folders that hold secrets. Code such as credentials.py stays, because the run may
# import it.
_SECRETS = """
    .env .env.* *.env .envrc .netrc _netrc .npmrc .pypirc .htpasswd .passwd* .pgpass pgpass.conf .my.cnf .mylogin.cnf
    .s3cfg .boto rclone.conf kaggle.json .dockercfg .dockerconfigjson .vault-token .ssh .aws .azure .gnupg .kube
    *.pem *.key *.p12 *.pfx *.ppk *.jks *.keystore *.kdbx id_rsa* id_dsa* id_ecdsa* id_ed25519*
    *credential* *secret* *password* *service?account*.json *kubeconfig* *.tfvars *.tfvars.json *.tfstate *.tfstate.*
    token token.json token.pickle *token.txt *.token *_token stored_tokens *api_key* *api-key* *apikey*
""".split()
_SECRET_PATHS = ("*/.docker/config.json", "*/.config/gcloud/*", "*/.config/gh/hosts.yml")
"""Files that only their folder tells from others of that name."""
_CODE = (".py", ".pyi", ".pyc", ".md", ".rst")


@dataclass(frozen=True)
class GitState:
    """Where the code was.

    `dirty` means that tracked files differ from `commit`. `left_out` are files that look like secrets. Names that are
    not UTF-8 text have surrogates in them, as `os.fsdecode` makes them.
    """

    commit: str | None
    branch: str | None
    remote: str | None
    dirty: bool
    left_out: list[str]
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Snapshot:
    """The tracked `files` of the checkout at `root`, packed. Without a checkout it has only the installed versions."""

    root: Path | None = None
    files: list["_File"] = field(default_factory=list)
    git: GitState | None = None
    diff: str = ""
    size: int = 0

    def archive(self, config: str) -> bytes:
        """Return the .tar.zst, holding `config` as config.yaml. The same content gives the same bytes."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            _add(tar, "config.yaml", config.encode())
            _add(tar, "requirements.txt", _installed().encode())
            if self.root is not None and self.git is not None:
                _add(tar, "git.json", json.dumps(asdict(self.git), indent=1).encode())
                _add(tar, "git.diff", os.fsencode(self.diff))
                for file in self.files:
                    tar.addfile(file.member, io.BytesIO(file.content))
        return zstandard.compress(packed.getvalue(), 9)

    def sentence(self) -> str:
        if self.root is None or self.git is None:
            return "no git checkout here: the configuration and the installed versions"
        changed = " with changes" if self.git.dirty else ""
        commit = (self.git.commit or "no commit yet")[:12]
        kept = (
            f"{len(self.files)} tracked files of {_printable(str(self.root))} ({commit}{changed},"
            f" {self.size / 1e6:.1f} MB)"
        )
        return kept + (f"; {left_out}" if (left_out := self.left_out()) else "")

    def has_module(self, name: str) -> bool:
        """Return whether Python finds the module `name` in the top folder of the code."""
        return any(
            file.member.name == f"code/{name}.py" or file.member.name.startswith(f"code/{name}/") for file in self.files
        )

    def left_out(self) -> str:
        """Return which tracked files are not in it, and why; empty when all are."""
        if self.git is None:
            return ""
        why = {"as they look like secrets": self.git.left_out, "as they cannot be read": self.git.unreadable}
        return "; ".join(
            f"left out, {reason}: {few([*map(_printable, names)])}" for reason, names in why.items() if names
        )


class _File(NamedTuple):
    member: tarfile.TarInfo
    content: bytes


def take(directory: Path) -> Snapshot:
    """Look at the git checkout that `directory` is in, if it is in one.

    Raises:
        ConfigError: its tracked files are larger than `MOST_BYTES`.
    """
    top = _git(directory, "rev-parse", "--show-toplevel")
    if top is None:
        return Snapshot()
    root = Path(top.removesuffix("\n"))
    tracked = git_names(root, "ls-files", "-z")
    wanted = [Path(name) for name in sorted(tracked) if not looks_secret(name) and _is_there(root, Path(name))]
    _check_size(root, wanted)
    files, unreadable = _read(root, wanted)
    questions = (("rev-parse", "HEAD"), ("branch", "--show-current"), ("remote", "get-url", "origin"))
    commit, branch, remote = ((_git(root, *question) or "").strip() or None for question in questions)
    # The user's own settings of git must neither change the difference nor show a file of a submodule in it.
    diff = ("diff", "HEAD", "--no-renames", "--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short")
    without = [_exclude(name) for name in unreadable]  # git would give up at one
    changed = git_names(root, *diff, "-z", "--name-only", "--", ".", *without)
    secret = sorted({name for name in (*tracked, *changed) if looks_secret(name)})
    text = _git(root, *diff, "--", ".", *without, *map(_exclude, secret))
    state = GitState(commit, branch, remote and without_credentials(remote), bool(changed), secret, unreadable)
    return Snapshot(root, files, state, text or "", sum(len(file.content) for file in files))


def _check_size(root: Path, files: list[Path]) -> None:
    sizes = dict[Path, int]()
    for path in files:
        with suppress(OSError):
            sizes[path] = (root / path).lstat().st_size
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = ", ".join(
            f"{_printable(str(path))} ({sizes[path] / 1e6:.0f} MB)"
            for path in sorted(sizes, key=sizes.__getitem__)[:-4:-1]
        )
        raise ConfigError(
            f"the tracked files of {_printable(str(root))} are {total / 1e6:.0f} MB, a snapshot takes at most"
            f" {MOST_BYTES / 1e6:.0f} MB. The largest are {largest}. Leave data out of git, or start the run from"
            " another folder."
        )


def _read(root: Path, paths: list[Path]) -> tuple[list[_File], list[str]]:
    """Read the files. Also returns the names of those that cannot be read or are gone by now."""
    files, unreadable = list[_File](), list[str]()
    with tarfile.open(fileobj=io.BytesIO(), mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in paths:
            try:
                member = _without_owner(tar.gettarinfo(root / path, f"code/{path}"))
                content = (root / path).read_bytes() if member.isreg() else b""
            except OSError:
                unreadable.append(str(path))
            else:
                member.size = len(content)
                files.append(_File(member, content))
    return files, unreadable


def _exclude(name: str) -> str:
    """Return the pathspec by which git leaves out a file."""
    return f":(top,exclude,literal){name}"


def unpack(archive: bytes, directory: Path) -> Path:
    """Unpack a snapshot into `directory`. Returns the folder of its code, which may be missing.

    Links that lead out of it are not unpacked: they mean something on the machine that they were made on.

    Raises:
        Damaged: it is no snapshot, or a few bytes of it stand for more than any snapshot has.
    """
    try:
        with zstandard.ZstdDecompressor().stream_reader(archive) as reader:
            content = reader.read(_MOST_UNPACKED + 1)
    except zstandard.ZstdError as error:
        raise Damaged(f"the snapshot of the run's code is damaged ({error}).") from error
    if len(content) > _MOST_UNPACKED:
        raise Damaged(
            f"the snapshot of the run's code stands for more than {_MOST_UNPACKED / 1e6:.0f} MB, and none has so much."
        )
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(directory, filter=_inside)
    return directory / "code"


def _inside(member: tarfile.TarInfo, directory: str) -> tarfile.TarInfo | None:
    try:
        return tarfile.data_filter(member, directory)
    except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
        return None


def _git(directory: Path, *arguments: str) -> str | None:
    """Return the output of git; None if git or a checkout is missing, or the question has no answer."""
    try:
        done = children.run(["git", "-C", str(directory), *arguments], capture_output=True, timeout=_GIT_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return os.fsdecode(done.stdout) if done.returncode == 0 else None


def git_names(root: Path, *arguments: str) -> list[str]:
    """Return the paths that git lists with -z."""
    return [name for name in (_git(root, *arguments) or "").split("\0") if name]


def _is_there(root: Path, path: Path) -> bool:
    """Return whether the tracked `path` is a file or a link in the checkout.

    It may be deleted, or be a submodule's folder. If one of its folders is a link by now, it is not there for git
    either: the link may lead anywhere.
    """
    if any((root / folder).is_symlink() for folder in path.parents):
        return False
    return (root / path).is_symlink() or (root / path).is_file()


def looks_secret(name: str) -> bool:
    """Return whether a file of this name probably holds a secret, and so is never copied."""
    name = name.lower()
    if name.endswith(_CODE):
        return False
    return any(fnmatchcase(part, pattern) for part in Path(name).parts for pattern in _SECRETS) or any(
        fnmatchcase(f"/{name}", pattern) for pattern in _SECRET_PATHS
    )


def _printable(name: str) -> str:
    """Return a file's name in a message that is written as UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def _installed() -> str:
    # The library parses the whole of each description, which takes seconds for some hundred packages.
    texts = (dist.read_text("METADATA") or dist.read_text("PKG-INFO") or "" for dist in distributions())
    headers = (dict(_NAME_OR_VERSION.findall(text.partition("\n\n")[0])) for text in texts)
    found = {f"{header['Name']}=={header.get('Version')}" for header in headers if "Name" in header}
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
