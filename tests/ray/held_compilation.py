"""`capstan` with chapters of 4 KiB, whose compilation of the second waits until the run has come to a step, or is
stopped.

python -m tests.ray.held_compilation RUN_URI STEP train CONFIG ...
"""

import sys
import time
from typing import Any

from launcher.cli.__main__ import main
from launcher.drive.driver import _LOOK_SECONDS
from launcher.view.status import read_generation
from trainer.data.compile import fingerprint
from trainer.data.compile.compile import ShardWriter
from trainer.data.source import rows
from trainer.store.store import open_store

PATIENCE = 200.0
# Chapters of some 50 of our documents, read in small batches.
SMALL = ((fingerprint, "CHAPTER_BYTES", 4096), (rows, "BATCH_ROWS", 4), (rows, "_READ_BYTES", 64))


def hold(uri: str, step: int) -> None:
    run, plain = open_store(uri), ShardWriter.add

    def held(self: ShardWriter, *given: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.chapter == 1:
            if run.exists("STOP"):
                time.sleep(2 * _LOOK_SECONDS)  # else these few rows are compiled before it looks for a stop
                break
            if any(done["step"] >= step for done in read_generation(run, 1)["step"]):
                break
            assert time.monotonic() < deadline, f"the run did not come to step {step}"
            time.sleep(0.05)
        plain(self, *given)

    ShardWriter.add = held  # type: ignore[method-assign]


if __name__ == "__main__":
    _, uri, step, *sys.argv[1:] = sys.argv
    for setting in SMALL:
        setattr(*setting)
    hold(uri, int(step))
    main()
