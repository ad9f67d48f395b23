"""The power that a GPU draws, as NVIDIA's driver reports it. A thread reads it, so the training never waits for it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock

import torch

from trainer.processes import children
from trainer.run.background import Every

_SECONDS = 10.0
_DRIVER_SECONDS = 30


class PowerMeter:
    """Reads the power of `gpu`, a UUID or a number of nvidia-smi's, every so many seconds in a thread."""

    def __init__(self, gpu: str, seconds: float) -> None:
        self._gpu, self._watts, self._lock = gpu, list[float](), Lock()
        self._reading = Every(seconds, self._read, "reading the GPU's power")
        self._reading.now()

    def measured(self) -> dict[str, float]:
        """Return `device_watts`, the mean since the last call, or nothing if there was no reading in between."""
        with self._lock:
            watts, self._watts = self._watts, []
        return {"device_watts": round(sum(watts) / len(watts), 1)} if watts else {}

    def close(self) -> None:
        self._reading.stop(wait=False)  # nvidia-smi may never answer for a GPU that is gone

    def _read(self) -> None:
        query = ["--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        command = ["nvidia-smi", f"--id={self._gpu}", *query]
        told = children.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=True).stdout
        with suppress(ValueError), self._lock:  # nvidia-smi prints "[N/A]" for a GPU that does not report it
            self._watts.append(float(told))


@contextmanager
def metered(device: torch.device, *, reads: bool) -> Iterator[Callable[[], dict[str, float]]]:
    """Yield a function that gives the result of `PowerMeter.measured` for `device`.

    It gives nothing on a CPU, without nvidia-smi, or if this rank does not read the power (`reads`).
    """
    if not reads or device.type != "cuda" or shutil.which("nvidia-smi") is None:
        yield dict
        return
    meter = PowerMeter(f"GPU-{torch.cuda.get_device_properties(device).uuid}", _SECONDS)
    try:
        yield meter.measured
    finally:
        meter.close()
