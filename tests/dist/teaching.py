"""A teacher that writes beside a run's data, by the function that every rank of `capstan teach` calls."""

import os
import signal
from typing import Any

from trainer.evaluate import teach as teaching
from trainer.evaluate.program import Ask


def teach(config_text: str, killed_at: int | None = None) -> dict[str, Any]:
    """The pass of all ranks. `killed_at`: each gets SIGKILL when it would write that block or a later one."""
    write_block = teaching.write_block

    def write(folder: Any, record: Any, block: int, documents: Any) -> int:
        if killed_at is not None and block >= killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_block(folder, record, block, documents)

    teaching.write_block = write
    return teaching.teach(Ask("teach", "", config=config_text), lambda told: None)
