"""Answers to the prompts of `eval.prompts` in the course of a run (trainer/evaluate/generation.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.config.section import Section, Steps, part, setting
from trainer.train.every import Action, ActionKind, Actions, Moment

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.evaluate.generation import PromptSamples
    from trainer.train.loop import Training


class SampleSettings(Section):
    """How often prompts are answered."""

    sample_every: Steps = setting(
        0,
        about=(
            "Answer eval.prompts every N steps, before the first step and at the end, always with the likeliest"
            " token. The answers are kept in the run's folder. 0 turns this off."
        ),
        example=200,
    )


@dataclass
class Sample(Action):
    run: Training
    samples: PromptSamples
    every: int

    def is_due(self, now: Moment) -> bool:
        return now.step == self.run.horizon.steps or (now.is_every(self.every) and not now.stopping)

    def act(self, now: Moment) -> None:
        self.run.begin("evaluate")
        self.samples.take(self.run.engine, now.step, lambda: self.run.begin("evaluate"))
        self.run.begin("save", now.step)


def _open(run: Training, _: Actions) -> Sample | None:
    from trainer.evaluate.generation import open_samples

    start = run.start
    every = part(start.config.train, SampleSettings).sample_every
    return Sample(run, open_samples(start.resolved, start.folder, start.ranks), every) if every else None


def _mismatches(config: Config) -> Iterator[str]:
    from trainer.config.objective import HEADS

    if not part(config.train, SampleSettings).sample_every:
        return
    if not config.eval.prompts:
        yield "train.sample_every: has no effect without eval.prompts. Set that, or set it to 0."
    if (name := config.objective.name) in HEADS:
        yield f"train.sample_every: objective.name: {name} has a head that writes no answers. Remove it."


SETTINGS = (SampleSettings,)
ACTIONS = {"sample": ActionKind(_open, _mismatches)}
