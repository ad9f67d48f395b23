"""Finds the files of a data set on the Hugging Face Hub, and keeps them in huggingface_hub's cache.

A path is `hf://owner/name` or `hf://datasets/owner/name`, as pandas and `datasets` write it, with `@revision` behind the name, and
behind that a file or a glob. Without one the data set's own description says which files a subset and a split have: `configs` in
its README.md, else the names of the files, as `datasets` takes them (datasets/data_files.py).
"""

import fnmatch
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from trainer.errors import DataError

SCHEME = "hf"
_PATH = re.compile(r"hf://(?:datasets/)?(?!datasets/)([\w.-]+/[\w.-]+?)(?:@(refs/[\w-]+/[\w.-]+|[^/@]+))?(?:/(.+))?")
_CARD = "README.md"
# Words in the names of files and folders that stand for a split.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval"),
}


@dataclass(frozen=True)
class HubFile:
    """A file of a data set: `uri` names it without the revision, `path` is in the cache, and `version` is the name of its content."""

    uri: str
    path: Path
    version: str


def find_hub_files(
    path: str, subset: str | None, split: str | None, name: str, endings: Sequence[str]
) -> list[HubFile]:
    """The files of a split, with these `endings`, in the cache; those that it lacks are downloaded.

    HF_TOKEN opens private data sets, HF_ENDPOINT names another Hub, and with HF_HUB_OFFLINE the cache alone is asked.

    Raises:
        DataError: it is not there, or there is no such subset or split. `name` is the setting.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise DataError(
            f"{name}: {path!r} is no data set of the Hub. Give hf://owner/name, with @revision or a file behind it."
        )
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    repo, revision, pattern = match[1], unquote(match[2]) if match[2] else None, match[3]

    def fetch(chosen: list[str]) -> Path:
        if HF_HUB_OFFLINE:
            return _cached(repo, revision or "main")
        patterns = [glob.escape(key) for key in chosen]
        return Path(
            huggingface_hub.snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
        )

    with _explained(repo, name):
        if HF_HUB_OFFLINE:
            folder = fetch([])
            keys = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        else:
            keys = sorted(huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset", revision=revision))
        if pattern is None:
            card = huggingface_hub.metadata_load(fetch([_CARD]) / _CARD) if _CARD in keys else None
            chosen = _of_split(keys, card or {}, subset, split or "train", repo, name, endings)
        else:
            chosen = [key for key in keys if key == pattern or fnmatch.fnmatchcase(key, pattern)]
        if not chosen:
            raise DataError(f"{name}: {path!r} matches no file of the data set {repo}, which has {_few(keys)}.")
        folder = fetch(chosen)
    return [HubFile(f"hf://datasets/{repo}/{key}", folder / key, (folder / key).resolve().name) for key in chosen]


def _cached(repo: str, revision: str) -> Path:
    """The folder of the revision in the cache, which may lack files that nobody asked for. Raises `OSError` where there is none."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        there = [found for found in scan_cache_dir().repos if (found.repo_type, found.repo_id) == ("dataset", repo)]
    except CacheNotFound:
        there = []
    for found in (each for known in there for each in known.revisions):
        if revision in (found.commit_hash, *found.refs):
            return found.snapshot_path
    raise FileNotFoundError(f"it is not in the cache, and HF_HUB_OFFLINE forbids to ask for it, revision {revision}")


def _of_split(
    keys: list[str],
    card: Mapping[str, Any],
    subset: str | None,
    split: str,
    repo: str,
    name: str,
    endings: Sequence[str],
) -> list[str]:
    data = [key for key in keys if key.endswith(tuple(endings))]
    configs = {
        config.get("config_name", "default"): config for config in card.get("configs") or [] if isinstance(config, dict)
    }
    configs = {called: config for called, config in configs.items() if config.get("data_files")}
    if subset is not None and subset not in configs:
        raise DataError(
            f"{name.replace('.path', '.subset')}: the data set {repo} has no {subset!r}, but {_few(list(configs))}."
        )
    if not configs:
        return _by_name(data, split, repo, name)
    default = next((called for called, config in configs.items() if config.get("default")), None)
    if subset is None and default is None and len(configs) > 1 and "default" not in configs:
        raise DataError(
            f"{name.replace('.path', '.subset')}: the data set {repo} has the subsets {_few(list(configs))}. Name one."
        )
    config = configs[subset or default or ("default" if "default" in configs else next(iter(configs)))]
    splits = dict(_patterns(config["data_files"]))
    if split not in splits:
        raise _no_split(split, list(splits), repo, name)
    folder = f"{config['data_dir'].strip('/')}/" if config.get("data_dir") else ""
    return [key for key in data if any(fnmatch.fnmatchcase(key, folder + pattern) for pattern in splits[split])]


def _patterns(files: Any) -> Iterator[tuple[str, list[str]]]:
    """The patterns of each split, in whichever form a card gives them."""
    if isinstance(files, list) and files and isinstance(files[0], dict):
        for entry in files:
            yield str(entry.get("split")), _listed(entry.get("path"))
    elif isinstance(files, dict):
        for split, path in files.items():
            yield split, _listed(path)
    else:
        yield "train", _listed(files)


def _listed(path: Any) -> list[str]:
    return [str(each) for each in (path if isinstance(path, list) else [path])]


def _by_name(keys: list[str], split: str, repo: str, name: str) -> list[str]:
    """The files whose names have a word of the split; all of them are training data where no name has any."""
    found = {known: [key for key in keys if _has_word(key, words)] for known, words in _SPLITS.items()}
    found = {known: own for known, own in found.items() if own} or {"train": keys}
    own = found.get(split) or [key for key in keys if _has_word(key, (split,))]
    if not own:
        raise _no_split(split, list(found), repo, name)
    return own


def _has_word(key: str, words: Sequence[str]) -> bool:
    return re.search(rf"(?:^|[/._\-\s\d])(?:{'|'.join(map(re.escape, words))})(?:$|[/._\-\s\d])", key) is not None


def _no_split(split: str, splits: list[str], repo: str, name: str) -> DataError:
    return DataError(
        f"{name.replace('.path', '.split')}: the data set {repo} has no split {split!r}, but {_few(splits)}."
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "") if names else "none"


@contextmanager
def _explained(repo: str, name: str) -> Iterator[None]:
    from httpx2 import HTTPError  # which huggingface_hub asks by, and whose refused connections it hands on
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except (HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{name}: the Hub did not give the data set {repo} ({reason}). Check the name, HF_TOKEN for a private or gated one, "
            "HF_ENDPOINT, or HF_HUB_OFFLINE for one that is in the cache."
        ) from error
