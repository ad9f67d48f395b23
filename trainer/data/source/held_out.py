"""The part of the rows that a data set uses if some rows are held out."""

import hashlib
import json
from dataclasses import dataclass

from trainer.data.format.formats import or_error
from trainer.data.source.rows import Batch, OnBad, Row, at
from trainer.errors import DataError


@dataclass(frozen=True)
class Part:
    """The rows that are used: all of them, or one side of a split that holds out `fraction` of them.

    A row's content and `seed` decide its side.
    """

    fraction: float = 0.0
    seed: int = 0
    held_out: bool = False

    def has(self, row: Row) -> bool:
        """Whether the row is on this side. Equal rows are on the same side, wherever they stand."""
        if not self.fraction:
            return True
        content = json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(content, digest_size=8, salt=self.seed.to_bytes(8, "little")).digest()
        return (int.from_bytes(digest, "little") < self.fraction * 2**64) == self.held_out

    def rows(self, batch: Batch, on_bad: OnBad) -> list[tuple[str, Row]]:
        """The rows of a batch on this side, with their places. A bad row counts once, on the training side."""
        report: OnBad = (lambda error: None) if self.held_out else on_bad
        rows: list[tuple[str, Row]] = []
        for where, row in batch.rows(report):
            chosen = or_error(self.has, row)
            if isinstance(chosen, DataError):
                report(at(where, chosen))
            elif chosen:
                rows.append((where, row))
        return rows


EVERYTHING = Part()
