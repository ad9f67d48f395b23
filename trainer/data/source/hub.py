"""Finds the files of a data set on the Hugging Face Hub, and keeps them in huggingface_hub's cache.

A path is `hf://owner/name` or `hf://datasets/owner/name`, as in pandas and `datasets`. `@revision` may follow the name,
and then a file or a glob. Without a file or a glob the data set itself says which files a subset and a split have:
`configs` in its README.md, or else the names of the files, as in `datasets` (datasets/data_files.py).
"""

import fnmatch
import glob
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from trainer.errors import DataError, few, first_line
from trainer.store.hub import hub_answers

SCHEME = "hf"
_PATH = re.compile(r"hf://(?:datasets/)?(?!datasets/)([\w.-]+/[\w.-]+?)(?:@(refs/[\w-]+/[\w.-]+|[^/@]+))?(?:/(.+))?")
_CARD = "README.md"
# Files that describe a data set. `datasets` does not read them as data either (FILES_TO_IGNORE in its data_files.py).
_ABOUT = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})(.*)")
# Words in the names of files and folders that stand for a split.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval"),
}


def repository(path: str) -> str | None:
    """The repository owner/name of the data set that a path names. None if it names none."""
    match = _PATH.fullmatch(path)
    return match[1] if match else None


def find_hub_files(
    path: str, subset: str | None, split: str | None, name: str, endings: Sequence[str]
) -> dict[str, Path]:
    """URI without revision -> path in the cache, for the files of a split with these `endings`. Downloads missing ones.

    HF_TOKEN opens private data sets, HF_ENDPOINT names another Hub, and with HF_HUB_OFFLINE only the cache is used.

    Raises:
        DataError: the data set does not exist, or has no such subset or split. `name` is the setting.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise DataError(
            f"{name}: {path!r} is no data set of the Hub. Give hf://owner/name, with @revision or a file behind it."
        )
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    offline = HF_HUB_OFFLINE or not hub_answers()
    repo, revision, pattern = match[1], unquote(match[2]) if match[2] else None, match[3]

    def fetch(chosen: list[str]) -> Path:
        patterns = [glob.escape(key) for key in chosen]
        folder = huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=patterns, local_files_only=offline
        )
        return Path(folder)

    with _explained(repo, name):
        known = True
        if offline:
            keys, known = _listed_before(repo, revision)
        else:
            keys = sorted(huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset", revision=revision))
        if pattern is None:
            card = _read_card(fetch([_CARD]) / _CARD, repo, name) if _CARD in keys else {}
            chosen = _of_split(keys, card, subset, split or "train", repo, name, endings)
            if not known:
                _check_parts(chosen)
        else:
            # A name with brackets may be that of a file, and not a pattern.
            chosen = [pattern] if pattern in keys else [key for key in keys if fnmatch.fnmatchcase(key, pattern)]
        if not chosen:
            raise DataError(f"{name}: {path!r} matches no file of the data set {repo}, which has {few(keys)}.")
        folder = fetch(chosen)
    return {f"hf://datasets/{repo}/{key}": folder / key for key in chosen}


def _listed_before(repo: str, revision: str | None) -> tuple[list[str], bool]:
    """The names of a revision's files according to the cache, and whether the list is complete.

    An earlier huggingface_hub kept no list; then only the files that it fetched are known. Raises `OSError` if there
    are none."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    with suppress(CachedRepoTreeNotFoundError):
        return sorted(file.path for file in get_cached_repo_tree(repo, repo_type="dataset", revision=revision)), True
    folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()), False


def _check_parts(chosen: list[str]) -> None:
    """Raises `OSError` if files are numbered parts of a whole and some parts are missing."""
    parts = Counter(match.groups() for key in chosen if (match := _PART.fullmatch(key)))
    for (start, whole, _), there in parts.items():
        if there < int(whole):
            raise FileNotFoundError(
                f"the cache has {there} of the {int(whole)} parts of {start}, and HF_HUB_OFFLINE forbids to ask for"
                " others"
            )


def _read_card(path: Path, repo: str, name: str) -> Mapping[str, Any]:
    import huggingface_hub
    from yaml import YAMLError

    try:
        return huggingface_hub.metadata_load(path) or {}
    except (YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}: the description in the {_CARD} of the data set {repo} cannot be read ({reason}). Name its files,"
            f" such as hf://{repo}/*.parquet."
        ) from error


def _of_split(
    keys: list[str],
    card: Mapping[str, Any],
    subset: str | None,
    split: str,
    repo: str,
    name: str,
    endings: Sequence[str],
) -> list[str]:
    """Those of `keys` that are the files of a split.

    The data set's card may list them by subset and split. Otherwise their names decide, as in the Hub's own viewer."""
    data = [key for key in keys if key.endswith(tuple(endings)) and not _is_hidden(key)]
    entries = [entry for entry in _listed(card.get("configs")) if isinstance(entry, dict)]
    configs = {str(entry.get("config_name", "default")): entry for entry in entries}
    configs = {called: entry for called, entry in configs.items() if entry.get("data_files") or entry.get("data_dir")}
    if subset is not None and subset not in configs:
        raise DataError(
            f"{name.replace('.path', '.subset')}: the data set {repo} has no {subset!r}, but {few(list(configs))}."
        )
    if not configs:
        return _by_name(data, split, repo, name)
    default = next((called for called, config in configs.items() if config.get("default")), None)
    if subset is None and default is None and len(configs) > 1 and "default" not in configs:
        raise DataError(
            f"{name.replace('.path', '.subset')}: the data set {repo} has the subsets {few(list(configs))}. Name one."
        )
    config = configs[subset or default or ("default" if "default" in configs else next(iter(configs)))]
    folder = f"{str(config['data_dir']).strip('/')}/" if config.get("data_dir") else ""
    if not config.get("data_files"):
        return _by_name([key for key in data if key.startswith(folder)], split, repo, name)
    splits = dict(_patterns(config["data_files"]))
    if split not in splits:
        raise _no_split(split, list(splits), repo, name)
    return [key for key in data if any(fnmatch.fnmatchcase(key, folder + pattern) for pattern in splits[split])]


def _is_hidden(key: str) -> bool:
    *folders, file = key.split("/")
    return file in _ABOUT or any(part.startswith((".", "__")) for part in (*folders, file))


def _patterns(files: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield the patterns of each split, from any form that a card may have."""
    if isinstance(files, list) and all(isinstance(entry, dict) for entry in files):
        for entry in files:
            yield str(entry.get("split")), _texts(entry.get("path"))
    elif isinstance(files, dict):
        for split, path in files.items():
            yield str(split), _texts(path)
    else:
        yield "train", _texts(files)


def _texts(path: Any) -> list[str]:
    return list(map(str, _listed(path)))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _by_name(keys: list[str], split: str, repo: str, name: str) -> list[str]:
    """The files whose names contain a word of the split. If no name contains any, all files are training data."""
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
        f"{name.replace('.path', '.split')}: the data set {repo} has no split {split!r}, but {few(splits)}."
    )


@contextmanager
def _explained(repo: str, name: str) -> Iterator[None]:
    from httpx2 import HTTPError  # huggingface_hub uses it, and passes on its errors for refused connections
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except (HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DataError(
            f"{name}: the Hub did not give the data set {repo} ({first_line(error)}). Check the name, HF_TOKEN for a"
            " private or gated one, HF_ENDPOINT, or HF_HUB_OFFLINE for one that is in the cache."
        ) from error
