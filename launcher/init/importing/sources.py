"""Data sets of peers as sources of ours: paths, Hub ids, and rows whose format their tools name."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.init.importing.mapping import Keys

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|mds|txt|gz|zst|xz)$", re.IGNORECASE)
_FIRST = re.compile(r"(\w+)\[:(\d+)(%?)\]")  # of a split the first so many rows, or per cent of them
_READERS = ("json", "csv", "parquet", "text", "arrow", "pandas")


def source_paths(path: str, files: Any = None, revision: str | None = None) -> list[str]:
    """Where the rows are: a file, a folder, a bucket's URI, or `hf://owner/name` with its files.

    `path` may be a reader of `datasets`, such as json, whose `files` are what is read.
    """
    if isinstance(files, dict):
        files = files.get("train") or next(iter(files.values()), None)
    listed = [files] if isinstance(files, str) else [str(name) for name in files] if isinstance(files, list) else []
    if path in _READERS and listed:
        return [name.removeprefix("file://") for name in listed]
    if is_hub_id(path):
        base = f"hf://{path}{f'@{revision}' if revision else ''}"
        return [f"{base}/{name}" for name in listed] or [base]
    if listed:
        return [name if name.startswith(("/", "s3://", "hf://")) else f"{path.rstrip('/')}/{name}" for name in listed]
    return [path.removeprefix("file://")]


def sources_at(
    paths: Sequence[str], rows: Mapping[str, Any], subset: Any = None, split: str | None = None
) -> list[dict[str, Any]]:
    """A source at each path, with what of `rows` is given, such as their format; with a subset, and a split other than
    train, where it is a data set of the Hub."""
    of_hub = {"subset": subset, "split": None if split == "train" else split}
    return [
        {
            "path": path,
            **{
                name: value for name, value in {**rows, **(of_hub if path.startswith("hf://") else {})}.items() if value
            },
        }
        for path in paths
    ]


def sections(given: Any) -> list[dict[str, Any]]:
    """The sections of a list, or the one that stands in a list's place; a name is one with nothing but a path."""
    listed = given if isinstance(given, list) else [given]
    named = [{"path": item} if isinstance(item, str) and item else item for item in listed]
    return [item for item in named if isinstance(item, dict)]


def is_hub_id(path: str) -> bool:
    """Whether `path` names a data set of the Hub, and nothing that is here."""
    return bool(_HUB_ID.fullmatch(path)) and not _FILE.search(path) and not Path(path).expanduser().exists()


def split_of(keys: Keys, key: str, given: Any) -> tuple[str | None, int | float | None]:
    """The name of a split, and what is taken of it, as `data.train[].take` has it. Where `key` asks for more than that,
    it is said to be lost.
    """
    if not given:
        return None, None
    if (found := _FIRST.fullmatch(str(given).strip())) is not None:
        amount, percent = int(found[2]), found[3]
        return found[1], (amount / 100 if amount < 100 else None) if percent else amount or None
    name = re.split(r"[\[+]", str(given))[0].strip()
    if name != str(given):
        keys.lose(key, f"{given}: a part that does not begin with the first row, or several splits. It is read whole.")
    return name, None
