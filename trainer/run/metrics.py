"""The metrics that a run writes as it goes on: records for anyone, and curves for TensorBoard."""

import resource
from collections.abc import Callable
from typing import Any

import torch

from trainer.errors import AlreadyExists
from trainer.run import layout
from trainer.run.background import Every, Harmless
from trainer.run.curves import Curves
from trainer.run.records import generations, record_line
from trainer.run.segments import Appender
from trainer.store import Store

CURVES_SECONDS = 60.0
"""TensorBoard's events follow the records at this distance: people look at curves less often than at a status."""
_SENDING, _SENDING_CURVES = "sending the metrics", "sending TensorBoard's events"


def claim_generation(folder: Store) -> int:
    """The number of this start of the run, from 1: claimed by creating its metrics, so two starts never share one."""
    generation = max(generations(folder), default=0) + 1
    while True:
        try:
            folder.create(layout.metrics(generation), b"")
        except AlreadyExists:
            generation += 1
        else:
            return generation


class Metrics:
    """The metrics of one generation; rank 0 writes, the others' calls do nothing. No call fails, whatever goes wrong."""

    def __init__(
        self, folder: Store, generation: int, *, writes: bool, flush_seconds: float, tensorboard: bool
    ) -> None:
        self._records = Appender(folder, layout.metrics(generation)) if writes else None
        self._recording, self._drawing = Harmless("making a record"), Harmless("making TensorBoard's events")
        self._sending, self._sending_curves = Harmless(_SENDING), Harmless(_SENDING_CURVES)
        self._curves: Curves | None = None
        self._flushers: list[Every] = []
        if self._records is None:
            return
        self._flushers.append(Every(flush_seconds, self.flush, _SENDING))
        if tensorboard:
            self._drawing(lambda: self._draw(Curves(folder, generation), max(flush_seconds, CURVES_SECONDS)))

    def _draw(self, curves: Curves, seconds: float) -> None:
        self._curves = curves
        self._flushers.append(Every(seconds, self.flush_curves, _SENDING_CURVES))

    def write(self, kind: str, **values: Any) -> None:
        if (records := self._records) is None:
            return
        self._recording(lambda: records.append(record_line(kind, values)))
        if (curves := self._curves) is not None and kind in ("step", "eval"):
            self._drawing(lambda: curves.add(kind, values))

    def flush(self) -> None:
        """Bring the records in the store up to date."""
        self._with_records(Appender.flush)

    def flush_curves(self) -> None:
        """Bring TensorBoard's events in the store up to date."""
        if (curves := self._curves) is not None:
            self._sending_curves(curves.flush)

    def write_now(self, kind: str, **values: Any) -> None:
        """`write`, and bring the store up to date outside the rhythm, without waiting for it."""
        self.write(kind, **values)
        for flusher in self._flushers[:1]:
            flusher.now()

    def close(self) -> None:
        for flusher in self._flushers:
            flusher.stop()
        self._with_records(Appender.close)
        if (curves := self._curves) is not None:
            self._sending_curves(curves.close)

    def _with_records(self, action: Callable[[Appender], None]) -> None:
        if (records := self._records) is not None:
            self._sending(lambda: action(records))


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak resident memory of this process and, on a GPU, peak allocated device memory, in bytes."""
    peak = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak
