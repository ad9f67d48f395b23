"""The first half of `--verify`: every byte of an export is the one that a second export of the checkpoint gives.

The second export writes nothing: the format writes to a store that compares. Predictions on some rows would not reveal
one weight among billions, a setting that matters only for long texts, or a token that no row has.
"""

from collections.abc import Iterable

from trainer.errors import CapstanError, NotFound
from trainer.export.destination import CARD, ExportProgress, Written
from trainer.export.figures import NOT_TRAINED
from trainer.export.format import ExportFormat
from trainer.store.store import PART_BYTES, Buffer, Entry, Store


class ComparedStore(Store):
    """The folder of an export, which accepts only what is in it already.

    Until then it looks empty to the code that exports to it.

    The model card is left out: it has the evaluations that the run has by now.
    """

    def __init__(self, there: Store) -> None:
        # This is not the URI of a local folder, because a format might move a file into that folder itself.
        super().__init__(there.uri.removeprefix("file://"), there._backend, there._prefix, there._request_seconds)
        self._there = there
        self._written: set[str] = {CARD}

    def list(self, prefix: str = "") -> list[Entry]:
        return []

    def put(self, key: str, data: bytes) -> None:
        self.put_chunks(key, [data], len(data))

    def create(self, key: str, data: bytes) -> None:
        self.put_chunks(key, [data], len(data))

    def put_chunks(self, key: str, chunks: Iterable[Buffer], size: int) -> None:
        if key == CARD:
            return
        self._written.add(key)
        where, position = f"{self.uri}/{key}", 0
        try:
            found = self._there.head(key).size
        except NotFound as error:
            raise CapstanError(f"{where} is missing. {NOT_TRAINED}") from error
        if found != size:
            raise CapstanError(f"{where} has {found} bytes instead of {size}. {NOT_TRAINED}")
        for chunk in chunks:
            for part in _parts(chunk):
                end = position + len(part)
                if self._there.get_range(key, position, end) != part:
                    raise CapstanError(
                        f"{where} differs from what was trained between bytes {position} and {end}. {NOT_TRAINED}"
                    )
                position = end

    def check_nothing_else(self) -> None:
        """Raise `CapstanError` for a file that was not written: a program might load it beside the others."""
        others = [entry.key for entry in self._there.list() if entry.key not in self._written]
        if others:
            raise CapstanError(f"{self.uri}/{others[0]} is no part of the export. {NOT_TRAINED}")


def _parts(chunk: Buffer) -> Iterable[memoryview]:
    view = memoryview(chunk)
    return (view[begin : begin + PART_BYTES] for begin in range(0, len(view), PART_BYTES))


def check_again(form: ExportFormat, folder: Store, step: int, destination: Store) -> Written:
    """Return what the format finds out once more.

    Raises `CapstanError` if `destination` is not the export of `step` in this form, file by file and byte by byte.
    """
    compared = ComparedStore(destination)
    written = form.write(folder, compared, step, ExportProgress(_silent, _silent))
    compared.check_nothing_else()
    return written


def _silent(*_told: object) -> None:
    """Report nothing: the export has already been reported."""
