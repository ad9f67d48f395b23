"""The results of evaluations and the samples in a run's folder, for reports. Damaged ones are named and left out."""

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

from trainer.errors import NOT_JSON
from trainer.run import layout
from trainer.run.evaluations import finite
from trainer.store.store import Store

_MOST_SAMPLES, _MOST_STEPS, _LONGEST = 12, 6, 1500
M = TypeVar("M", bound=BaseModel)


Number = Annotated[float | None, BeforeValidator(finite)]


class Loss(BaseModel):
    """Nats a target token, and e to that power."""

    loss: Number = None
    perplexity: Number = None


class SetResult(BaseModel):
    """The losses on one set.

    `difference` is the adapter's loss minus the base's. `interval` is its 95 % interval, if there are documents enough
    for one. `data` is the fingerprint of the set's documents, and `trained_on` the number of them that were trained on;
    earlier evaluations lack both. `server` is the server that answered instead of ranks.
    """

    data: str | None = None
    documents: int | None = None
    trained_on: int | None = None
    tokens: int | None = None
    base: Loss | None = None
    adapter: Loss | None = None
    difference: Number = None
    interval: tuple[Number, Number] | None = None
    server: str | None = None


class MetricResult(BaseModel):
    """One metric of a task.

    `stderr` is the adapter's standard error, `base_stderr` the base's, which earlier evaluations lack. `server` is as
    for a set.
    """

    base: Number = None
    adapter: Number = None
    base_stderr: Number = None
    stderr: Number = None
    server: str | None = None


class Spread(BaseModel):
    """The gap in log-probability between paired sentences, in nats."""

    mean: Number = None
    std: Number = None


class BiasResult(BaseModel):
    """The gaps of one group of paired sentences."""

    pairs: int | None = None
    base: Spread | None = None
    adapter: Spread | None = None
    server: str | None = None


class EvaluationFigures(BaseModel):
    """One `capstan evaluate`: of the adapter after `step` updates, beside its base."""

    step: int
    made: Number = None
    sets: dict[str, SetResult] = {}
    tasks: dict[str, dict[str, MetricResult]] = {}
    bias: dict[str, BiasResult] = {}


class SampleText(BaseModel):
    """A prompt and its answers, including the base's if the base was asked too."""

    prompt: str
    base: str | None = None
    adapter: str | None = None


class SampleFigures(BaseModel):
    """The answers after `step` updates. `left_out` prompts are not shown."""

    step: int
    samples: list[SampleText]
    left_out: int = 0


def read_evaluations(folder: Store, notes: list[str]) -> list[EvaluationFigures]:
    """Return all evaluations, by step."""
    found = [_parsed(EvaluationFigures, folder.get(key), key, notes) for key in _keys(folder, layout.EVALUATIONS)]
    return sorted(filter(None, found), key=lambda evaluation: evaluation.step)


def other_data(seen: Iterable[tuple[str, int, object]]) -> Iterator[str]:
    """Yield a sentence for each set that has other documents than before.

    `seen` has in order the set's name, the step of its evaluation, and its fingerprint.
    """
    last = dict[str, str]()
    for name, step, data in seen:
        if isinstance(data, str) and last.setdefault(name, data) != data:
            last[name] = data
            yield f"{name} is other data from step {step} on, so its losses do not compare with those before."


def read_samples(folder: Store, notes: list[str]) -> list[SampleFigures]:
    """Return the samples of the first step and of the newest ones, with long texts cut."""
    keys = _keys(folder, layout.SAMPLES)
    found = []
    for key in [*keys[:1], *keys[1:][1 - _MOST_STEPS :]]:
        lines = folder.get(key).splitlines()
        samples = [sample for line in lines if (sample := _parsed(SampleText, line, key, notes))]
        shown = [_cut(sample) for sample in samples[:_MOST_SAMPLES]]
        if shown and (step := layout.step_of_result(key)) is not None:
            found.append(SampleFigures(step=step, samples=shown, left_out=len(samples) - len(shown)))
    return found


def _keys(folder: Store, prefix: str) -> list[str]:
    return sorted(entry.key for entry in folder.list(prefix) if layout.step_of_result(entry.key) is not None)


def _parsed(kind: type[M], data: bytes, key: str, notes: list[str]) -> M | None:
    try:
        return kind.model_validate(json.loads(data))
    except (ValidationError, *NOT_JSON):
        notes.append(f"{key} is damaged, and what it says is left out.")
        return None


def _cut(sample: SampleText) -> SampleText:
    long = {name: f"{text[:_LONGEST]} […]" for name, text in sample if text is not None and len(text) > _LONGEST}
    return sample.model_copy(update=long)
