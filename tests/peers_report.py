"""How much of other tools' configurations an import carries over: `python -m tests.peers_report [FOLDER ...]`.

Every file in the folders, by default those of tests/peers, is imported. The report counts the files that lose no key,
and names the keys that are lost most often. Only keys with a value count; files that are refused are another training,
or no configuration.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from launcher.init.importing.importing import import_files
from trainer.errors import CapstanError

_KINDS = (".yaml", ".yml", ".json", ".sh", ".py")
_NONE = ("dataset_info.json", "expected.yaml")  # what is read beside such a file, and no configuration itself
_MOST_KEYS = 40


class Report(NamedTuple):
    """Files that were imported, those of them that lose keys, the files that lose each key, and why files were
    refused.
    """

    imported: int
    losing: dict[str, list[str]]
    keys: Counter[str]
    refused: dict[str, str]


def report_on(paths: Sequence[Path]) -> Report:
    found = Report(0, {}, Counter(), {})
    for path in paths:
        try:
            made = import_files([path])
        except CapstanError as error:
            found.refused[str(path)] = str(error)
            continue
        found = found._replace(imported=found.imported + 1)
        lost = sorted({outcome.key for outcome in made.keys if outcome.status in ("not supported", "unknown")})
        if lost:
            found.losing[str(path)] = lost
        found.keys.update(lost)
    return found


def files_in(folders: Sequence[str]) -> list[Path]:
    found = (path for folder in folders for path in Path(folder).rglob("*") if path.suffix in _KINDS)
    return sorted(path for path in found if path.name not in _NONE)


def _lines(found: Report) -> Iterator[str]:
    whole = found.imported - len(found.losing)
    yield (
        f"{found.imported} files imported, of which {whole} ({100 * whole / max(1, found.imported):.0f} %) lose no key"
    )
    yield from (f"{count:5} files lose {key}" for key, count in found.keys.most_common(_MOST_KEYS))
    yield f"{len(found.refused)} files refused"
    yield from (f"      {path}: {reason[:150]}" for path, reason in found.refused.items())


if __name__ == "__main__":
    given = sys.argv[1:] or [str(Path(__file__).parent / "peers")]
    print(*_lines(report_on(files_in(given))), sep="\n")
