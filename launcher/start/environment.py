"""Packs the Python environment that submits a run into one archive in the store (`cluster.environment: archive`).

    environments/<name>.json                 what the archive is, written last
    environments/<name>-<random>.tar.zst     the environment, and the sources of what is installed editable

Runs share it: `<name>` follows from the names, sizes and times of the files, so an environment is packed once as long
as nobody changes it. The interpreter is not carried: the machine that unpacks (launcher/start/carried.py) gives its
own. Scripts, activation files, .pth files and the finders of editable installs hold absolute paths, which are replaced
there.
"""

import ast
import csv
import hashlib
import json
import os
import re
import secrets
import stat
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import zstandard

from launcher.start.carried import TEMPORARY, this_python
from launcher.start.snapshot import git_names, looks_secret
from trainer.config import Config
from trainer.errors import AlreadyExists, ConfigError, few
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.store.store import open_run_store

_MOST_SOURCES = 2**30
"""How large the sources of one editable install may be: an archive is for code, not for data."""
_TEXT_BYTES = 2**20
_PIECE = 2**20
_LEVEL = 3  # of zstandard: about as small as 9, and several times as fast
_FINDER = re.compile(r"__editable___\w+_finder")
"""setuptools gives such a name to the module by which it installs a project editable."""


@dataclass
class Environment:
    """A virtual environment at `prefix`. Its `name` in the store follows from its content.

    `files` and `links` have the names in the archive: files with their paths here, links with what they lead to.
    `places` are folders here -> their folders in the archive, and `rewritten` the files that hold such paths.
    """

    prefix: str
    files: dict[str, Path] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    rewritten: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    bytes: int = 0
    name: str = ""

    def command(self, config: Config, folder: str = TEMPORARY) -> list[str]:
        """Return what follows `python -m`, and comes before the arguments of the environment's Python on a machine.

        `folder` is one of the machine's own.
        """
        return ["launcher.start.carried", "run", run_folder(config).uri, self.name, folder]

    def sentence(self) -> str:
        """Return a sentence that tells people what is packed."""
        also = [old for old, new in self.places.items() if new]
        editable = f", with the sources of {few(also)}" if also else ""
        secret = f"; left out, as they look like secrets: {few(self.left_out)}" if self.left_out else ""
        return f"{len(self.files):,} files of {self.prefix} ({self.bytes / 1e6:,.0f} MB){editable}{secret}"


def look(prefix: Path | None = None) -> Environment:
    """Look at the environment at `prefix`, which is this process's own unless one is given.

    Raises:
        ConfigError: it is one that does not work at another place.
    """
    prefix = prefix or Path(sys.prefix)
    _check_carriable(prefix)
    found = Environment(str(prefix), places={str(prefix): "", str(prefix.resolve()): ""})
    _add_tree(found, str(prefix.resolve()), str(prefix.resolve()), "", ())
    _leave_secrets_out(found, prefix)
    for number, root in enumerate(_editable(prefix)):
        found.places |= dict.fromkeys([str(root), str(root.resolve())], f"editable/{number}")
        _add_sources(found, root, f"editable/{number}")
    found.rewritten = [name for name in found.files if _holds_paths(found, name)]
    digest = hashlib.sha256(json.dumps([found.prefix, found.places, found.links, this_python()]).encode())
    for name, path in sorted(found.files.items()):
        facts = path.stat()
        found.bytes += facts.st_size
        if "__pycache__" not in name:  # an import here makes more of these, and nothing depends on them
            digest.update(os.fsencode(f"{name} {facts.st_size} {facts.st_mtime_ns} {facts.st_mode}\n"))
    found.name = digest.hexdigest()[:24]
    return found


def _check_carriable(prefix: Path) -> None:
    try:
        settings = (prefix / "pyvenv.cfg").read_text()
    except OSError as error:
        raise ConfigError(
            f"cluster.environment: archive: {prefix} is no virtual environment, and paths of other kinds are written"
            " into their programs. Make one with `python -m venv` or `uv venv`, install Capstan into it, and submit"
            " with that."
        ) from error
    if re.search(r"^include-system-site-packages\s*=\s*true", settings, re.MULTILINE | re.IGNORECASE):
        raise ConfigError(
            f"cluster.environment: archive: {prefix} also uses the packages of the system (include-system-site-packages"
            f" in {prefix / 'pyvenv.cfg'}), which an archive does not have. Make an environment without that."
        )


def _add_tree(found: Environment, prefix: str, folder: str, name: str, above: tuple[str, ...]) -> None:
    """Add what is in `folder` under `name`. Links that lead out of the environment are followed.

    `prefix`, `folder` and the folders `above` it are real paths, without links.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        inside, real = f"{name}{entry.name}", entry.path
        if inside == "pyvenv.cfg" or re.fullmatch(r"bin/python[\d.]*", inside):
            continue  # these are made on the machine that unpacks
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
            if real.startswith(f"{prefix}/") and os.path.exists(real):
                found.links[inside] = os.path.relpath(real, f"{prefix}/{name}")
                continue
        if entry.is_dir():
            if real not in (folder, *above):
                _add_tree(found, prefix, real, f"{inside}/", (folder, *above))
        elif entry.is_file():
            found.files[inside] = Path(real)


def _leave_secrets_out(found: Environment, prefix: Path) -> None:
    """Leave out files that look like secrets and that no installed package lists as its own.

    Packages bring such names, too: certificates of authorities, pictures of a password.
    """
    secret = [name for name in found.files if looks_secret(name)]
    brought = _brought(prefix) if secret else set()
    for name in secret:
        if name not in brought:
            del found.files[name]
            found.left_out.append(name)


def _brought(prefix: Path) -> set[str]:
    """The files, relative to the environment, that the records of its packages list."""
    names = set[str]()
    for site in _site_packages(prefix):
        here = os.path.relpath(site, prefix.resolve())
        for record in site.glob("*.dist-info/RECORD"):
            with record.open(encoding="utf-8", errors="surrogateescape", newline="") as rows:
                names.update(os.path.normpath(f"{here}/{row[0]}") for row in csv.reader(rows) if row)
    return names


def _site_packages(prefix: Path) -> list[Path]:
    return list(dict.fromkeys(path.resolve() for path in prefix.glob("lib*/python*/site-packages")))


def _editable(prefix: Path) -> list[Path]:
    """Return the folders of the projects that are installed editable and that the environment leads to.

    Raises:
        ConfigError: an import leads out of the environment in a way that does not work elsewhere.
    """
    roots, used = list[Path](), dict[Path, None]()
    for site in _site_packages(prefix):
        for told in sorted(site.glob("*.dist-info/direct_url.json")):  # PEP 610
            about = json.loads(told.read_text())
            if about.get("dir_info", {}).get("editable"):
                roots.append(Path(unquote(urlsplit(about["url"]).path)))
    for site in _site_packages(prefix):
        for pth in sorted(site.glob("*.pth")):
            for path in _outside(pth, prefix):
                holding = [root for root in roots if {root, root.resolve()} & {Path(path), *Path(path).parents}]
                if not holding:
                    raise ConfigError(
                        f"cluster.environment: archive: {pth.name} leads to {path}, which is outside of {prefix} and"
                        " belongs to no project that was installed with `pip install -e`. Install it as a package, and"
                        f" remove {pth}."
                    )
                used[holding[0]] = None
    return list(used)


def _outside(pth: Path, prefix: Path) -> Iterator[str]:
    """Yield the existing paths outside of the environment that a .pth file, or a module that it imports, names."""
    for line in pth.read_text(errors="replace").splitlines():
        if not line.startswith(("import ", "import\t")):
            if line.strip() and not line.startswith("#"):
                yield from _if_outside(os.path.join(pth.parent, line.strip()), prefix)
            continue
        for module in dict.fromkeys(re.findall(r"[A-Za-z_]\w*", line)):
            source = pth.with_name(f"{module}.py")
            paths = [path for text in _texts(source) for path in _if_outside(text, prefix)] if source.is_file() else []
            if paths and not _FINDER.fullmatch(module):
                raise ConfigError(
                    f"cluster.environment: archive: {pth.name} imports {module}, which builds or finds a project at"
                    f" {paths[0]} when it is imported, and that does not work elsewhere. Install the project without"
                    " -e."
                )
            yield from paths


def _texts(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/"):
            yield node.value


def _if_outside(path: str, prefix: Path) -> Iterator[str]:
    if "\0" in path:
        return
    there = Path(os.path.normpath(path))
    inside = there.is_relative_to(prefix) or there.resolve().is_relative_to(prefix.resolve())
    # A finder names a module without its suffix.
    if there != there.parent and not inside and (there.exists() or Path(f"{there}.py").exists()):
        yield str(there)


def _add_sources(found: Environment, root: Path, name: str) -> None:
    """Add the sources of an editable project: what git knows or would add, or everything, and compiled modules."""
    listed = git_names(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    known, size, sizes = set(listed), 0, dict[str, int]()
    for path in _sources(root):
        here = str(path.relative_to(root))
        if known and here not in known and path.suffix != ".so":
            continue
        if looks_secret(here):
            found.left_out.append(here)
            continue
        found.files[f"{name}/{here}"] = path
        sizes[here] = path.stat().st_size
        size += sizes[here]
    if size > _MOST_SOURCES:
        largest = ", ".join(
            f"{here} ({sizes[here] / 1e6:,.0f} MB)" for here in sorted(sizes, key=lambda n: -sizes[n])[:3]
        )
        raise ConfigError(
            f"cluster.environment: archive: {root}, which is installed editable, has {size / 1e6:,.0f} MB, and an"
            f" archive takes at most {_MOST_SOURCES / 1e6:,.0f} MB of one project. The largest are {largest}. Move data"
            " elsewhere, or install the project without -e."
        )


def _sources(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            environment = (path / "pyvenv.cfg").exists()
            if not (entry.name.startswith(".") or entry.name in ("__pycache__", "node_modules") or environment):
                yield from _sources(path)
        elif entry.is_file():
            yield path


def _holds_paths(found: Environment, name: str) -> bool:
    """Return whether the file is one of those in which absolute paths matter, and has one that moves."""
    path = Path(name)
    if not (name.startswith("bin/") or path.suffix == ".pth" or _FINDER.fullmatch(path.stem)):
        return False
    here = found.files[name]
    if here.stat().st_size > _TEXT_BYTES:
        return False
    text = here.read_bytes()
    return b"\0" not in text and any(os.fsencode(old) in text for old in found.places)


def to_carry(config: Config) -> Environment | None:
    """Look at this process's environment if the run is to carry it. Raises what `look` does."""
    return look() if config.cluster.environment == "archive" else None


def carry(config: Config, environment: Environment, log: Callable[[str], None]) -> None:
    """Put the environment into the run's store, unless it is there. If several do, all use what was ready first."""
    store = open_run_store(config)
    if store.exists(layout.environment(environment.name)):
        log(f"environment: {environment.sentence()}; the store has it already")
        return
    log(f"environment: packing {environment.sentence()}")
    archive = layout.environment_archive(environment.name, secrets.token_hex(4))
    sha256, packed = hashlib.sha256(), 0

    def counted() -> Iterator[bytes]:
        nonlocal packed
        for piece in _pack(environment):
            sha256.update(piece)
            packed += len(piece)
            yield piece

    try:
        store.put_chunks(archive, counted(), environment.bytes)
        about = {
            "archive": archive,
            "sha256": sha256.hexdigest(),
            "archive_bytes": packed,
            "bytes": environment.bytes,
            "files": len(environment.files),
            "places": environment.places,
            "rewritten": environment.rewritten,
            **this_python(),
        }
        store.create(layout.environment(environment.name), json.dumps(about).encode())
    except BaseException as error:
        store.delete(archive)
        if not isinstance(error, AlreadyExists):
            raise


def _pack(environment: Environment) -> Iterator[bytes]:
    """Yield the archive piece by piece."""
    compressed = zstandard.ZstdCompressor(level=_LEVEL, threads=-1).compressobj()
    for piece in _tar(environment):
        if packed := compressed.compress(piece):
            yield packed
    yield compressed.flush()


def _tar(environment: Environment) -> Iterator[bytes]:
    for name, path in environment.files.items():
        member = tarfile.TarInfo(name)
        with path.open("rb") as content:
            facts = os.fstat(content.fileno())
            # Python compares the time of a source, in whole seconds, with that in its compiled file.
            member.size, member.mtime, member.mode = facts.st_size, int(facts.st_mtime), stat.S_IMODE(facts.st_mode)
            yield member.tobuf(tarfile.PAX_FORMAT)
            left = member.size
            while left:
                piece = content.read(min(left, _PIECE))
                if not piece:
                    raise ConfigError(
                        f"cluster.environment: archive: {path} became shorter while it was packed. Submit again when"
                        " nobody changes the environment."
                    )
                left -= len(piece)
                yield piece
        yield bytes(-member.size % tarfile.BLOCKSIZE)
    for name, target in environment.links.items():
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, target
        yield member.tobuf(tarfile.PAX_FORMAT)
    yield bytes(2 * tarfile.BLOCKSIZE)
