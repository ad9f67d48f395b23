"""The functions by which a writer of exports reports progress, and the result that it returns."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trainer.export.folder import BytesWritten
from trainer.state.checkpoint.manifest import CheckpointManifest


class ExportProgress(NamedTuple):
    """`written` is told of bytes done and bytes in all, `say` of what begins now, in a sentence."""

    written: BytesWritten
    say: Callable[[str], None]


def print_bytes() -> BytesWritten:
    """Prints them now and then, in lines that the launcher reads."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2 or done == total:
            last = time.monotonic()
            print("progress", done, total, flush=True)

    return report


@dataclass(frozen=True)
class Written:
    """An export that was written: the checkpoint it is of, and what its format found out, as JSON and in sentences."""

    manifest: CheckpointManifest
    facts: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
