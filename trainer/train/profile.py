"""A trace of a few steps by torch's profiler, `train.profile`, for https://ui.perfetto.dev."""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.run import layout
from trainer.run.background import Harmless
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store


class StepProfile:
    """Traces the first to the last of `steps`, both included, and keeps the trace in the run's folder; None traces
    nothing.

    It is told by `reached` which state the loop has come to. A run that ends in between leaves the trace of the steps
    until then. A trace that cannot be made or kept ends no run.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Store, log: Callable[[str], None]) -> None:
        self._steps, self._run, self._log = steps, folder, log
        self._profiler: profile | None = None
        self._begun = 0
        self._harmless = Harmless("the profile")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_failure: object) -> None:
        if self._profiler is not None:
            self._harmless(self._keep)

    def reached(self, step: int) -> None:
        """The state after `step` updates is reached."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._profiler is not None and step >= last:
            self._harmless(self._keep)
        elif self._profiler is None and first - 1 <= step < last:
            self._harmless(lambda: self._begin(step + 1))

    def _begin(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities, record_shapes=True)
        profiler.start()
        self._profiler, self._begun = profiler, step

    def _keep(self) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        profiler.stop()
        key = layout.profile(self._begun)
        with scratch_folder("profile") as folder:
            written = Path(folder, "trace.json.gz")
            profiler.export_chrome_trace(str(written))
            self._run.put(key, written.read_bytes())
        self._log(
            f"profile: {key} in the run's folder has the steps from {self._begun} on; https://ui.perfetto.dev opens it"
        )
