"""The findings of `capstan evaluate` in a run's folder: one object for each step, to which each evaluation adds."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from trainer.config import Config
from trainer.errors import NOT_JSON, Damaged, NotFound
from trainer.run import layout
from trainer.store.store import Store, read_twice

FEWEST = 6
"""The fewest independent documents for an interval. Fewer have less than 40 different subsets, whose quantiles promise
less than 95 %.
"""

_HELD_OUT = {"eval", "held_out", "held_out_seed"}
"""Settings that may name the data of an evaluation if the run has none."""
# Each of these is a mapping by name. Tasks have their values by metric.
_PARTS = ("sets", "tasks", "bias")


def json_number(value: Any) -> Any:
    """Return None for a number that is not finite: JSON cannot express it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_evaluation(folder: Store, step: int) -> dict[str, Any]:
    """Read the stored findings of `step`. They are empty if the step was never evaluated or the object is damaged."""
    with suppress(NotFound, Damaged):
        return _read(folder, layout.evaluation(step))
    return {}


@read_twice
def _read(folder: Store, key: str) -> dict[str, Any]:
    """Read the findings. Raises `NotFound`, and `Damaged` if the object is no evaluation."""
    try:
        found = json.loads(folder.get(key))
    except NOT_JSON as error:
        raise Damaged(f"{folder.uri}/{key} is damaged: {error}.") from error
    whole = isinstance(found, dict) and all(_by_name(found.get(part, {})) for part in _PARTS)
    if not (whole and all(map(_by_name, found.get("tasks", {}).values()))):
        raise Damaged(f"{folder.uri}/{key} is damaged: it is no evaluation.")
    return found


def _by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


def other_settings(own: Config, given: Config) -> list[str]:
    """Return the settings in which `given` differs from the run's `own` so that an evaluation measures something else.

    The figures of such an evaluation are not the run's.
    """
    before, after = own.data.model_dump(), given.data.model_dump()
    held_out = set[str]() if own.data.eval or own.data.held_out else _HELD_OUT
    changed = [f"data.{name}" for name in before if name not in held_out and before[name] != after[name]]
    changed += [f"eval.sets.{name}" for name, of in own.eval.sets.items() if given.eval.sets.get(name, of) != of]
    return changed + (["eval.bias"] if own.eval.bias and own.eval.bias != given.eval.bias else [])


def keep_evaluation(folder: Store, found: Mapping[str, Any]) -> None:
    """Store `found`. Earlier findings of the step over the same base stay, unless `found` has measured them again."""
    earlier = read_evaluation(folder, found["step"])
    if earlier.get("base") == found["base"]:
        found = {**found, **{part: {**earlier.get(part, {}), **found[part]} for part in _PARTS}}
    folder.put(layout.evaluation(found["step"]), json.dumps(found, indent=1).encode())
