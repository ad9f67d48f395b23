"""The base model: where it is, its files, and what it says of itself.

Weights stay where they are, in a directory or a bucket; config.json and the tokenizer's files are always in a directory.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base.base import Base, Description
from trainer.base.describe.config_json import parse_base_config
from trainer.base.describe.description import describe
from trainer.base.describe.torch_answers import user_cache
from trainer.base.find.known import known_config
from trainer.base.find.rescaled import rescaled
from trainer.config import Model
from trainer.config.paths import check_file, local_path
from trainer.errors import BaseOutOfReach, ConfigError
from trainer.store.hub import hub_answers, hub_host
from trainer.store.safetensors_index import INDEX_FILE
from trainer.store.store import SCHEMES, Entry, Store, open_store

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # a path that begins with a dot is none
CHAT_TEMPLATE = "chat_template.jinja"
# The files that decide what a tokenizer does.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
    "chat_template.json",
)
NAMED_TEMPLATES = "additional_chat_templates"
"""The folder with a tokenizer's other chat templates, such as one for calls of tools, each by its name."""
TOKENIZER_PATTERNS = (*TOKENIZER_FILES, f"{NAMED_TEMPLATES}/*.jinja")
# Other folders of the Hub hold other formats, and consolidated files the same weights under other names.
_LEFT_ON_THE_HUB = [
    *(f"{NAMED_TEMPLATES[:at]}[!{NAMED_TEMPLATES[at]}]*/*" for at in range(len(NAMED_TEMPLATES))),
    "consolidated*",
]
CONFIG = "config.json"
_SMALL_FILES = ("*.json", "*.model", "*.jinja", "merges.txt", "README.md")


def resolve_base(model: Model) -> Base:
    """Find the base: a directory, a bucket's folder, or a Hub id (downloaded through huggingface_hub's cache).

    Raises:
        ConfigError: it is missing, has no config.json, or is of an architecture that is not supported.
        StorageError: the bucket does not answer or refuses.
    """
    local = None if in_bucket(model.base) else _directory(model, [*_SMALL_FILES, "*.safetensors"])
    store = open_store(str(local or model.base), setting="model.base")
    directory, name = _scaled(model, local or _small_files(store)), str(local or store.uri)
    config = _read_config(name, directory)
    return Base(name, directory, store, config, describe(config, model.layers, name=name), model.tokens)


def base_files(model: Model) -> Path:
    """A directory with config.json and the tokenizer's files; the weights are not downloaded for it."""
    if in_bucket(model.base):
        return _scaled(model, _small_files(open_store(model.base, setting="model.base")))
    return _scaled(model, _directory(model, list(_SMALL_FILES)))


def _scaled(model: Model, directory: Path) -> Path:
    """The base's directory, or where its rotary positions are scaled a folder with its small files and another config.json."""
    path = directory / CONFIG
    if model.rope_scaling.rope_type is None or not path.is_file():
        return directory
    return with_config(directory, rescaled(parse_base_config(model.base, path.read_bytes()), model.rope_scaling))


def with_config(directory: Path, config: Mapping[str, Any]) -> Path:
    """A folder with the small files of the base in `directory`, and another config.json."""
    every = (
        file.relative_to(directory).as_posix()
        for file in (*directory.iterdir(), *directory.glob(f"{NAMED_TEMPLATES}/*"))
    )
    files = named_files(directory, filter(is_small_file, every))
    return cached_folder({**files, CONFIG: json.dumps(config, indent=2).encode()})


def named_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Name -> content of those that are there."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def tokenizer_content(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files there that decide what a tokenizer does."""
    templates = sorted(f"{NAMED_TEMPLATES}/{path.name}" for path in (folder / NAMED_TEMPLATES).glob("*.jinja"))
    return named_files(folder, (*TOKENIZER_FILES, *templates))


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files`, whose names may have a folder before them."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _directory(model: Model, patterns: list[str]) -> Path:
    """The local directory, or the snapshot of a Hub id with the files that match."""
    directory = local_path(model.base, "model.base")
    if directory.is_dir():
        _check_files(directory)
        return directory
    if not is_hub_id(model.base):
        raise ConfigError(
            f"model.base: the directory {model.base!r} does not exist. Give a Hugging Face model directory, a bucket's "
            "URI or a Hub id."
        )
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model.base,
                revision=model.revision,
                allow_patterns=patterns,
                ignore_patterns=_LEFT_ON_THE_HUB,
                local_files_only=HF_HUB_OFFLINE or not hub_answers(),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, and the cache lacks it"
        elif not hub_answers():
            reason = f"{hub_host()} cannot be reached from here, and the cache lacks it"
        elif isinstance(error, GatedRepoError):
            reason = "its licence has to be accepted there first, and HF_TOKEN set"
        at = f" at model.revision={model.revision}" if model.revision else ""
        said = (
            f"model.base: {model.base!r} is no directory here, and the Hub did not give it{at} ({reason}). "
            f"Check the name{', the revision' if at else ''}, HF_TOKEN for a gated model, or download it to a directory first."
        )
        if HF_HUB_OFFLINE or not hub_answers() or isinstance(error, GatedRepoError):
            raise BaseOutOfReach(said, reason) from error
        raise ConfigError(said) from error


def _check_files(directory: Path) -> None:
    """Raises `ConfigError` where something in the folder of a base is no file, as transformers and we read them by their names."""
    for path in (*directory.glob("*"), *directory.glob(f"{NAMED_TEMPLATES}/*")):
        try:
            check_file(path)
        except OSError as error:
            raise ConfigError(f"model.base: {path} cannot be read: {error}. Remove it.") from error


def describe_base(model: Model) -> Description:
    """The description of the base by its config.json; no weights are downloaded for it. Raises as `resolve_base`."""
    return describe(_read_config(model.base, base_files(model)), model.layers, name=model.base)


@dataclass(frozen=True)
class AtHand:
    """The parts of a base that a plan takes. `directory` has its config.json and the tokenizer's files; it is None where the sizes are those that the
    package knows, which `said` says in a sentence."""

    description: Description
    directory: Path | None
    said: str | None = None


def base_at_hand(model: Model) -> AtHand:
    """The description of the base as `describe_base` has it, and of a well-known one also where it cannot be had from the Hub. Raises as
    `resolve_base`."""
    try:
        directory = base_files(model)
    except BaseOutOfReach as error:
        config = known_config(model.base)
        if config is None:
            raise
        said = (
            f"model.base: {model.base} was not seen ({error.reason}); its sizes are those that Capstan has with it of well-known bases, "
            "and neither its tokenizer nor its files were looked at."
        )
        if model.rope_scaling.rope_type:
            config = rescaled(config, model.rope_scaling)
        return AtHand(describe(config, model.layers, name=model.base), None, said)
    return AtHand(describe(_read_config(model.base, directory), model.layers, name=model.base), directory)


def in_bucket(base: str) -> bool:
    return base.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def is_hub_id(base: str) -> bool:
    """Whether `base` has the form of a Hub id. A directory of that name goes first."""
    return bool(_HUB_ID.fullmatch(base))


def _small_files(store: Store) -> Path:
    """A folder of this machine's cache with the base's small files, fetched once for each version of them."""
    entries = [entry for entry in store.list() if is_small_file(entry.key)]
    versions = json.dumps([store.uri, [[entry.key, entry.version] for entry in entries]])
    return _cached(versions, lambda: {entry.key: store.get(entry.key) for entry in entries})


def is_small_file(name: str) -> bool:
    """Whether it is a file of a base beside its weights, of those that are read."""
    if "/" in name:
        return Path(name).parent == Path(NAMED_TEMPLATES) and name.endswith(".jinja")
    return name != INDEX_FILE and any(Path(name).match(pattern) for pattern in _SMALL_FILES)


def cached_folder(files: Mapping[str, bytes]) -> Path:
    """A folder of this machine's cache with these files, for what reads folders only."""
    names = json.dumps(sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items()))
    return _cached(names, lambda: files)


def _cached(versions: str, fetch: Callable[[], Mapping[str, bytes]]) -> Path:
    """The folder of the cache for these `versions`; every rank of a machine may fill it at once, and the first to rename its own wins."""
    folder = user_cache() / "bases" / hashlib.sha256(versions.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as partial:
        whole = Path(partial) / "whole"
        whole.mkdir()
        write_files(whole, fetch())
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def copy_weights(base: Base, folder: Path) -> None:
    """Copy the base's files into `folder`, and link to weights on this machine: for tools that read neither a bucket nor ranges."""
    local = base.store.uri.removeprefix("file://") if base.store.uri.startswith("file://") else None
    write_files(folder, tokenizer_content(base.directory))
    for path in base.directory.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    for entry in base.store.list():
        if "/" in entry.key or not entry.key.endswith((".safetensors", INDEX_FILE)):
            continue
        if local is None:
            copy_object(base.store, entry, folder)
        elif not (folder / entry.key).exists():
            (folder / entry.key).symlink_to(Path(local) / entry.key)


def copy_object(store: Store, entry: Entry, folder: Path) -> None:
    """Copy one object into `folder`, a part at a time."""
    (folder / entry.key).parent.mkdir(exist_ok=True)
    with (folder / entry.key).open("wb") as file:
        for chunk in store.chunks(entry.key, entry.size):
            file.write(chunk)


def _read_config(name: str, directory: Path) -> dict[str, Any]:
    try:
        data = (directory / CONFIG).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"model.base: {name} has no config.json. Give a Hugging Face model directory.") from error
    except OSError as error:
        raise ConfigError(f"model.base: {name}/config.json cannot be read ({error}).") from error
    return parse_base_config(name, data)


def check_mergeable(model: Model, base: Description) -> None:
    """Raises `ConfigError` for a base that an adapter cannot be merged into; reads no weights."""
    if base.stored.unmergeable:
        raise ConfigError(
            f"there is no merged model: {model.base} is {base.stored.unmergeable}. Take --format peft: PEFT and vLLM load the adapter beside it."
        )
    if model.layers:
        raise ConfigError(
            f"there is no merged model: the run has the first {model.layers} layers of its base only (model.layers), and would leave the rest "
            "untrained. Take --format peft."
        )
