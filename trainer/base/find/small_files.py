"""The files of a base beside its weights, config.json and the tokenizer's, and the cache folders that hold them.

`rescaled` writes the scaling of rotary positions (`model.rope_scaling`) into a config.json for transformers and
servers. The base's files stay unchanged. A folder of this machine's cache gets its small files with the changed
config.json. From then on it is the base's directory: all code that builds, compares, exports or merges the model reads
it there.

`copy_weights` and `copy_object` fill a folder for tools that read neither a bucket nor ranges of bytes.
"""

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainer.base.base import Base
from trainer.base.describe.description import parse_base_config
from trainer.base.describe.torch_answers import user_cache
from trainer.config import Config
from trainer.config.model import RopeScaling
from trainer.config.row_kinds import ROW_KINDS
from trainer.errors import ConfigError
from trainer.store.safetensors_index import INDEX_FILE
from trainer.store.store import Entry, Store
from trainer.store.tokenizer_files import NAMED_TEMPLATES, TOKENIZER_FILES, is_tokenizer_file

TOKENIZER_PATTERNS = (*TOKENIZER_FILES, f"{NAMED_TEMPLATES}/*.jinja")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""The files that decide what a processor does, beside those of the tokenizer."""
CONFIG = "config.json"
SMALL_FILES = ("*.json", "*.model", "*.jinja", "merges.txt", "README.md")


def read_config(name: str, directory: Path) -> dict[str, Any]:
    try:
        data = (directory / CONFIG).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"model.base: {name} has no config.json. Give a Hugging Face model directory.") from error
    except OSError as error:
        raise ConfigError(f"model.base: {name}/config.json cannot be read ({error}).") from error
    return parse_base_config(name, data)


def read_scaled(name: str, directory: Path, scaling: RopeScaling) -> tuple[Path, dict[str, Any]]:
    """A directory with the base's small files and `scaling` in its config.json, and that config.json.

    `name` is the base's name in messages.
    """
    config = read_config(name, directory)
    if scaling.rope_type is None:
        return directory, config
    config = rescaled(config, scaling)
    return with_config(directory, config), config


def with_config(directory: Path, config: Mapping[str, Any]) -> Path:
    """A folder with the small files of the base in `directory`, and another config.json."""
    every = (
        file.relative_to(directory).as_posix()
        for file in (*directory.iterdir(), *directory.glob(f"{NAMED_TEMPLATES}/*"))
    )
    files = named_files(directory, filter(is_small_file, every))
    return cached_folder({**files, CONFIG: json.dumps(config, indent=2).encode()})


def named_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Name -> content, for those of `names` that exist in `folder`."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def tokenizer_content(folder: Path) -> dict[str, bytes]:
    """Name -> content, for the files in `folder` that decide what a tokenizer does."""
    templates = sorted(f"{NAMED_TEMPLATES}/{path.name}" for path in (folder / NAMED_TEMPLATES).glob("*.jinja"))
    return named_files(folder, filter(is_tokenizer_file, (*TOKENIZER_FILES, *templates)))


def write_small_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the small `files` of a base into `folder`."""
    for name, content in files.items():
        assert is_small_file(name), f"{name!r} would be written elsewhere, or is no file of a base"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


class SmallFiles(NamedTuple):
    """Name -> content of a base's small files, and a text that changes with their versions."""

    versions: str
    files: Mapping[str, bytes]


def fetched_small_files(store: Store) -> Path:
    """A folder of this machine's cache with the base's small files, fetched once for each version of them."""
    return _fetched(store)[1]


def read_small_files(store: Store) -> SmallFiles:
    """The base's small files, for other machines. This machine's cache has them afterwards."""
    versions, folder = _fetched(store)
    every = (path for path in folder.rglob("*") if path.is_file())
    return SmallFiles(versions, {path.relative_to(folder).as_posix(): path.read_bytes() for path in every})


def kept_small_files(told: SmallFiles) -> Path:
    """A folder of this machine's cache with the small files that another machine has read."""
    return _cached(told.versions, lambda: told.files)


def _fetched(store: Store) -> tuple[str, Path]:
    entries = [entry for entry in store.list() if is_small_file(entry.key)]
    versions = json.dumps([store.uri, [[entry.key, entry.version] for entry in entries]])
    return versions, _cached(versions, lambda: {entry.key: store.get(entry.key) for entry in entries})


def is_small_file(name: str) -> bool:
    """Whether it is one of the files beside a base's weights that Capstan reads."""
    if "/" in name:
        return is_tokenizer_file(name)
    return name != INDEX_FILE and any(Path(name).match(pattern) for pattern in SMALL_FILES)


def cached_folder(files: Mapping[str, bytes]) -> Path:
    """A folder of this machine's cache with these files, for code that only reads folders."""
    names = json.dumps(sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items()))
    return _cached(names, lambda: files)


def _cached(versions: str, fetch: Callable[[], Mapping[str, bytes]]) -> Path:
    """The folder of the cache for these `versions`.

    All ranks of a machine may fill it at the same time. The first one to rename its own folder wins.
    """
    folder = user_cache() / "bases" / hashlib.sha256(versions.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as partial:
        whole = Path(partial) / "whole"
        whole.mkdir()
        write_small_files(whole, fetch())
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


# Keys of an earlier scaling; others, such as rope_theta, stay.
_OF_SCALING = {*RopeScaling.model_fields, "type", "mscale", "mscale_all_dim", "truncate"}
_OF_ALL_TOKENS = "full_attention"
_ORIGINAL, _POSITIONS = "original_max_position_embeddings", "max_position_embeddings"


def rescaled(config: dict[str, Any], scaling: RopeScaling) -> dict[str, Any]:
    """The parsed config.json with `scaling` in place of the base's own.

    If kinds of layers have their own rotary parameters, only those that see all tokens get the scaling.
    `max_position_embeddings` becomes the number of positions that the base was trained for times the factor, as in
    published models with such a scaling.

    Raises:
        ConfigError: it lacks the number of positions that the base was trained for, or layers that see all tokens.
    """
    tree = copy.deepcopy(config)
    language = tree["text_config"] if isinstance(tree.get("text_config"), dict) else tree
    key = "rope_parameters" if language.get("rope_parameters") else "rope_scaling"
    before: dict[str, Any] = language.get(key) or {}
    by_kind = any(isinstance(value, dict) for value in before.values())
    if by_kind and not isinstance(before.get(_OF_ALL_TOKENS), dict):
        raise ConfigError(
            f"model.rope_scaling: the base has rotary parameters for each of {', '.join(sorted(before))}, and none for"
            f" {_OF_ALL_TOKENS}. Remove it."
        )
    own: dict[str, Any] = before[_OF_ALL_TOKENS] if by_kind else before
    original = (
        scaling.original_max_position_embeddings
        or own.get(_ORIGINAL)
        or language.get(_ORIGINAL)
        or language.get(_POSITIONS)
    )
    if not isinstance(original, int) or scaling.factor is None:
        raise ConfigError(
            "model.rope_scaling: config.json of the base does not say for how many positions it was trained. Set"
            f" model.rope_scaling.{_ORIGINAL}."
        )
    made = {name: value for name, value in own.items() if name not in _OF_SCALING} | copy.deepcopy(scaling.given)
    if scaling.rope_type == "linear":
        made.pop(_ORIGINAL, None)
    else:
        made[_ORIGINAL] = original
        if _ORIGINAL in language:
            language[_ORIGINAL] = original
    language[key] = {**before, _OF_ALL_TOKENS: made} if by_kind else made
    language[_POSITIONS] = round(scaling.factor * original)
    return tree


def copy_weights(base: Base, folder: Path) -> None:
    """Copy the base's files into `folder`. Weights that are on this machine are linked instead."""
    write_small_files(folder, tokenizer_content(base.directory))
    for path in base.directory.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    for entry in base.store.list():
        if "/" in entry.key or not entry.key.endswith((".safetensors", INDEX_FILE)):
            continue
        if base.store.local_folder is None:
            copy_object(base.store, entry, folder)
        elif not (folder / entry.key).exists():
            (folder / entry.key).symlink_to(base.store.local_folder / entry.key)


def copy_object(store: Store, entry: Entry, folder: Path) -> None:
    """Copy one object into `folder`, part by part."""
    (folder / entry.key).parent.mkdir(exist_ok=True)
    with (folder / entry.key).open("wb") as file:
        for chunk in store.chunks(entry.key, entry.size):
            file.write(chunk)


def seen_files(directory: Path, config: Config) -> Mapping[str, bytes]:
    """The files of the base's processor for an export of a run whose rows have pictures."""
    return processor_files(directory) if ROW_KINDS[config.data.kind].sees else {}


def processor_files(directory: Path) -> Mapping[str, bytes]:
    """Name -> content, for the files of the base's processor that there are."""
    return {name: (directory / name).read_bytes() for name in PROCESSOR_FILES if (directory / name).exists()}
