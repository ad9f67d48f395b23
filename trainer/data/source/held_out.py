"""The part of the rows that a data set has, where some are held out."""

import hashlib
import json
from dataclasses import dataclass

from trainer.data.format.formats import or_error
from trainer.data.source.rows import Batch, OnBad, Row, at
from trainer.errors import DataError


@dataclass(frozen=True)
class Part:
    """Which rows are used: all, or one side of a split in which `fraction` of them is held out, by content and
    `seed`.
    """

    fraction: float = 0.0
    seed: int = 0
    held_out: bool = False

    def has(self, row: Row) -> bool:
        """The same side for equal rows, wherever they stand."""
        if not self.fraction:
            return True
        content = json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(content, digest_size=8, salt=self.seed.to_bytes(8, "little")).digest()
        return (int.from_bytes(digest, "little") < self.fraction * 2**64) == self.held_out

    def rows(self, batch: Batch, on_bad: OnBad) -> list[tuple[str, Row]]:
        """The rows of a batch that are on this side, with their places. A bad row counts once: among those trained
        on.
        """
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
