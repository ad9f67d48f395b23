"""The metric that a sweep compares its trials by, read from a trial's records as they are written."""

import math
from collections.abc import Mapping
from statistics import fmean

from launcher.policy.comparable import Metric
from trainer.config.evaluation import UNNAMED, split_of
from trainer.config.sweep import TRAIN
from trainer.run import layout
from trainer.run.records import Record, RunReader
from trainer.run.segments import streams
from trainer.store.store import Store

_SMOOTHED_STEPS = 10
"""The training loss is a mean over so many steps, since that of one step is that of its few rows."""


class Scores:
    """The metric of the run in `folder` after each step that has one, NaN where it was no finite number; each look
    reads only what is new. Step 0 has none: there a trial is still the base."""

    def __init__(self, folder: Store, metric: Metric) -> None:
        self._folder, self._metric = folder, metric
        self._reader = RunReader(folder)
        self._losses: dict[int, float] = {}
        self._by_step: dict[int, float] = {}
        self.of_data = TRAIN if metric.of == TRAIN else split_of(metric.of)
        self.data: Mapping[str, str | None] = {}
        """The fingerprints of the data of the newest start, where they are known; the metric's own is that of
        `of_data`.
        """

    def read(self) -> dict[int, float]:
        """All of them so far, by step, in order. A start that goes on from a commit takes some steps a second time: its
        figures count.
        """
        for _, records in self._reader.read(streams(self._folder.list(layout.METRICS))):
            for record in records:
                self._add(record)
        return dict(sorted(self._by_step.items()))

    def _add(self, record: Record) -> None:
        if record["kind"] == "start":
            self.data = record.get("data", {})
        step, value = record.get("step"), record.get(self._metric.measure)
        if not isinstance(step, int) or step < 1:
            return
        if not isinstance(value, int | float) or not math.isfinite(value):
            value = math.nan
        if self._metric.of == TRAIN and record["kind"] == "step":
            self._losses[step] = value
            recent = range(step - _SMOOTHED_STEPS + 1, step + 1)
            self._by_step[step] = fmean(self._losses[earlier] for earlier in recent if earlier in self._losses)
        elif record["kind"] == "eval" and record.get("set", UNNAMED) == self._metric.of:
            self._by_step[step] = value
