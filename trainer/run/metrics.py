"""What a run tells the world: one JSON object a line in the store, and TensorBoard events.

Object stores cannot append, so a file is written again whole every `flush_seconds` from a background thread.
"""

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trainer.errors import AlreadyExists
from trainer.run import layout
from trainer.run.background import Every, try_now
from trainer.store import Store


def claim_generation(run: Store) -> int:
    """The number of this start of the run, from 1: claimed by creating its metrics file, so two starts never share one."""
    taken = [layout.generation_of(entry.key) or 0 for entry in run.list(layout.METRICS)]
    generation = max(taken, default=0) + 1
    while True:
        try:
            run.create(layout.metrics(generation), b"")
        except AlreadyExists:
            generation += 1
        else:
            return generation


class Metrics:
    """The metrics of one generation; rank 0 writes, the others' calls do nothing."""

    def __init__(self, run: Store, generation: int, *, writes: bool, flush_seconds: float, tensorboard: bool) -> None:
        self._run, self._key = run, layout.metrics(generation)
        self._writes = writes
        self._lines: list[str] = []
        self._folder = tempfile.TemporaryDirectory(prefix="capstan-tensorboard-")
        self._events = layout.tensorboard(generation)
        self._board = None
        if writes and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self._folder.name)
        self._flusher = Every(flush_seconds, self.flush) if writes else None

    def write(self, kind: str, **values: Any) -> None:
        if not self._writes:
            return
        self._lines.append(json.dumps({"kind": kind, **values, "time": round(time.time(), 3)}))
        if self._board is not None and kind in ("step", "eval"):
            for name, value in values.items():
                if name != "step" and not isinstance(value, str):
                    self._board.add_scalar(f"{kind}/{name}", value, values["step"])

    def flush(self) -> None:
        """Bring the store up to date."""
        if not self._writes:
            return
        lines = list(self._lines)
        self._run.put(self._key, "".join(line + "\n" for line in lines).encode())
        if self._board is not None:
            self._board.flush()
            for path in Path(self._folder.name).iterdir():
                self._run.put(self._events + path.name, path.read_bytes())

    def write_now(self, kind: str, **values: Any) -> None:
        """`write`, and bring the store up to date outside the rhythm, without waiting for it."""
        self.write(kind, **values)
        if self._flusher is not None:
            self._flusher.now()

    def close(self) -> None:
        if self._flusher is not None:
            self._flusher.stop()
            try_now(self.flush)
        if self._board is not None:
            self._board.close()
        self._folder.cleanup()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak resident memory of this process and, on a GPU, peak allocated device memory, in bytes."""
    peak = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak
