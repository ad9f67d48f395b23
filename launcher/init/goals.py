"""The goals that a first configuration may have: what each sets, and why."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel


class Goal(BaseModel):
    """A goal of goals.yaml: its settings with the reason for each, its learning rates, and the data that it needs, in
    words.
    """

    about: str
    data: str
    rates: tuple[float, float]
    rate_source: str
    trains_base: bool = False
    settings: Mapping[str, tuple[Any, str]]


GOALS: Mapping[str, Goal] = {
    name: Goal.model_validate(given)
    for name, given in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")).items()
}
