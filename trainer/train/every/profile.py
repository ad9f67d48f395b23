"""A trace of a few steps by torch's profiler, `train.profile`, for https://ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationInfo, field_validator

from trainer.config.section import Section, part, setting
from trainer.train.every import Action, ActionKind, Actions

if TYPE_CHECKING:
    from torch.profiler import profile

    from trainer.train.loop import Training
    from trainer.train.start import Start


class ProfileSettings(Section):
    """The steps that are traced."""

    profile: tuple[int, int] | None = setting(
        None,
        about=(
            "The first and the last step to trace. Rank 0 writes the trace into profiles/ in the run's folder; open"
            " it with https://ui.perfetto.dev. Tracing slows these steps. Default: none."
        ),
        example=[10, 12],
        unit="steps",
    )

    @field_validator("profile")
    @classmethod
    def _within(cls, given: tuple[int, int] | None, info: ValidationInfo) -> tuple[int, int] | None:
        steps = info.data.get("steps")
        if given is None or 1 <= given[0] <= given[1] <= (steps or given[1]):
            return given
        most = f", at most train.steps: {steps}" if steps else ""
        raise ValueError(
            f"train.profile: {list(given)} is not allowed. Give the first and the last step to trace,"
            f" counted from 1{most}. Example: [10, 12]."
        )


class StepProfile(Action):
    """Traces the first to the last of `steps`, both included, and keeps the trace in the run's folder.

    A run that ends in between leaves the trace of the steps until then. A trace that cannot be made or kept ends no
    run.
    """

    def __init__(self, steps: tuple[int, int], start: Start) -> None:
        from trainer.run.background import Harmless

        self._steps, self._run, self._log = steps, start.folder, start.log
        self._profiler: profile | None = None
        self._begun = 0
        self._harmless = Harmless("the profile")

    def begins(self, step: int) -> None:
        self._reached(step)

    def stepped(self, step: int) -> Mapping[str, float]:
        self._reached(step)
        return {}

    def close(self) -> None:
        if self._profiler is not None:
            self._harmless(self._keep)

    def _reached(self, step: int) -> None:
        """The state after `step` updates is reached."""
        first, last = self._steps
        if self._profiler is not None and step >= last:
            self._harmless(self._keep)
        elif self._profiler is None and first - 1 <= step < last:
            self._harmless(lambda: self._begin(step + 1))

    def _begin(self, step: int) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities, record_shapes=True)
        profiler.start()
        self._profiler, self._begun = profiler, step

    def _keep(self) -> None:
        from trainer.run import layout
        from trainer.store.scratch import scratch_folder

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


def _open(run: Training, _: Actions) -> StepProfile | None:
    steps = part(run.start.config.train, ProfileSettings).profile
    return StepProfile(steps, run.start) if steps and run.start.ranks.rank == 0 else None


SETTINGS = (ProfileSettings,)
ACTIONS = {"profile": ActionKind(_open)}
