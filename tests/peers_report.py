"""How much of other tools' configurations an import carries over: `python -m tests.peers_report [FOLDER ...]`.

Every file in the folders, by default those of tests/peers, is imported, and each folder is a line of the table: its
files, the trainings that came in, those of them that lose no key, and those that also leave nothing of the meaning to
the user. Then come the keys that are lost most often, what is left to do, and why files were refused. Only keys with a
value count. Refused files are another training, or no configuration. With several folders a last line adds them up:
the figure in docs/migration.md is that of the example folders of all peers, from checkouts of their repositories
(LLaMA-Factory's with `data` beside `examples`).
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launcher.init.importing.importing import import_files
from trainer.errors import CapstanError

_KINDS = (".yaml", ".yml", ".json", ".sh", ".py", ".ipynb")
_NONE = ("dataset_info.json", "expected.yaml")  # what is read beside such a file, and no configuration itself
_MOST_KEYS = 40
# What is left to the user and says where something is, or what it is called, and not what is trained or how.
_OF_PLACES = (
    "train.global_batch: counted for one GPU",
    "run.name: not in the file",
    "is its name on ModelScope",
    "comes with LLaMA-Factory",
    "is no file here",
    "which reads it",
    "has one; if that is wrong",
    "has none; if that is wrong",
    "which command reads it",
)


class Report(NamedTuple):
    """Files that were imported, those of them that lose keys, the files that lose each key, and why files were
    refused. `open` has the sentences on the meaning that each file leaves to the user.
    """

    imported: int
    losing: dict[str, list[str]]
    keys: Counter[str]
    refused: dict[str, str]
    open: dict[str, list[str]]

    @property
    def whole(self) -> int:
        """Files that lose no key."""
        return self.imported - len(self.losing)

    @property
    def same(self) -> int:
        """Files that lose no key, and leave nothing of their meaning to the user."""
        return self.imported - len(self.losing.keys() | self.open.keys())


def report_on(paths: Sequence[Path]) -> Report:
    found = Report(0, {}, Counter(), {}, {})
    for path in paths:
        try:
            made = import_files([path])
        except CapstanError as error:
            found.refused[str(path)] = str(error)
            continue
        if made.settings["model.base"] == "FILL-IN":
            found.refused[str(path)] = "It names no base, so it is no training: where one runs, or a part of a script."
            continue
        found = found._replace(imported=found.imported + 1)
        lost = sorted({outcome.key for outcome in made.keys if outcome.status in ("not supported", "unknown")})
        if lost:
            found.losing[str(path)] = lost
        if left := [line for line in made.to_do if not any(words in line for words in _OF_PLACES)]:
            found.open[str(path)] = left
        found.keys.update(lost)
    return found


def files_in(folders: Sequence[str]) -> list[Path]:
    found = (path for folder in folders for path in Path(folder).rglob("*") if path.suffix in _KINDS)
    return sorted(path for path in found if path.name not in _NONE)


def _table(reports: Mapping[str, Report]) -> Iterator[str]:
    yield "| folder | files | trainings that come in | lose no key | and leave nothing of the meaning open | refused |"
    yield "|---|---|---|---|---|---|"
    rows: dict[str, tuple[int, ...]] = {
        folder: (found.imported, found.whole, found.same, len(found.refused)) for folder, found in reports.items()
    }
    if len(rows) > 1:
        rows["all"] = tuple(map(sum, zip(*rows.values(), strict=True)))
    for folder, (imported, whole, same, refused) in rows.items():
        shares = (f"{count} ({100 * count / max(1, imported):.0f} %)" for count in (whole, same))
        yield f"| {folder} | {imported + refused} | {imported} | {' | '.join(shares)} | {refused} |"


def _lines(reports: Mapping[str, Report]) -> Iterator[str]:
    yield from _table(reports)
    lost, left, refused = Counter[str](), Counter[str](), dict[str, str]()
    for found in reports.values():
        lost += found.keys
        left.update(line for lines in found.open.values() for line in lines)
        refused |= found.refused
    yield from (f"{count:5} files lose {key}" for key, count in lost.most_common(_MOST_KEYS))
    yield from (f"{count:5} files leave to do: {line[:150]}" for line, count in left.most_common(_MOST_KEYS))
    yield f"{len(refused)} files refused"
    yield from (f"      {path}: {reason[:150]}" for path, reason in refused.items())


if __name__ == "__main__":
    given = sys.argv[1:] or [str(Path(__file__).parent / "peers")]
    print(*_lines({folder: report_on(files_in([folder])) for folder in given}), sep="\n")
