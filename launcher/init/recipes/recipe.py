"""The recipes of recipes.yaml, and the configuration that each becomes."""

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from launcher.init.commented import yaml_text
from launcher.init.recipes.data import FOLDER
from trainer.errors import ConfigError, shown

Setting = tuple[Any, str]
"""A setting's value and the reason for it."""

_STORAGE = {
    "none": "16 bits, as there is room",
    "nf4": "4 bits a weight (QLoRA)",
    "stored": "as its publisher has it, in 4 bits",
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RecipeGoal(_Part):
    """A goal of recipes.yaml: its title, what the model learns as a clause, the file of small data that shows its rows,
    those rows in words, and its settings.

    A setting of None removes one that the goal takes over from another goal.
    """

    title: str
    about: str
    data: str
    rows: str
    settings: Mapping[str, Setting | None]


class Recipe(_Part):
    """A base and a goal, with the GPUs that they were planned for. Without a GPU, `gpu` is CPU.

    `length` is the length of a packed row in tokens, `batch` the rows of a step, `micro_batch` the rows of a GPU at
    once.
    """

    base: str
    goal: str
    gpu: str
    gpus: int = 1
    quant: str = "nf4"
    length: int
    batch: int
    micro_batch: int = 1
    settings: Mapping[str, Setting] = {}

    @property
    def on_cpu(self) -> bool:
        return self.gpu == "CPU"

    @property
    def machine(self) -> str:
        """The GPUs in words."""
        return "a CPU" if self.on_cpu else f"{self.gpus} x {self.gpu}"


class Recipes(_Part):
    """The whole table."""

    goals: Mapping[str, RecipeGoal]
    recipes: Mapping[str, Recipe]


@cache
def table() -> Recipes:
    return Recipes.model_validate(yaml.safe_load(Path(__file__).with_name("recipes.yaml").read_text(encoding="utf-8")))


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`. Raises `ConfigError`, naming the nearest ones, if there is none."""
    recipes = table().recipes
    if name in recipes:
        return recipes[name]
    near = difflib.get_close_matches(name, recipes, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"NAME: {shown(name)} is no recipe. {hint}`capstan recipe` lists all {len(recipes)}.")


def recipe_text(name: str, folder: str = FOLDER) -> str:
    """Return the configuration of the recipe `name` as YAML, over the rows of `capstan recipe --data` in `folder`.

    Raises as `find_recipe`.
    """
    recipe = find_recipe(name)
    goal = table().goals[recipe.goal]
    given: dict[str, Setting | None] = {
        "run.name": (name, "the run's folder in the store"),
        "run.store": ("runs", "a folder, or s3://, gs:// or az://"),
        "model.base": (recipe.base, "a Hub id, a folder or a bucket's URI"),
        "quant.type": (recipe.quant, _STORAGE[recipe.quant]),
        "data.train": ([{"path": f"{folder}/{goal.data}"}], f"yours instead: {goal.rows}"),
        "data.sequence_length": (recipe.length, "tokens of a packed row; longer documents are cut"),
        "train.global_batch": (recipe.batch, "rows in a step, whatever the number of GPUs"),
        "train.micro_batch": (recipe.micro_batch, "rows on a GPU at once"),
        **goal.settings,
        **recipe.settings,
    }
    if not recipe.on_cpu:
        given["cluster.workers"] = (recipe.gpus, "one for each GPU; `resume` takes another number")
    settings = {key: setting for key, setting in given.items() if setting is not None}
    head = [
        f"{name}: the model {goal.about}.",
        f"Planned for {recipe.machine}; `capstan plan` says what it needs.",
        f"`capstan recipe --data {folder}` writes small data for a first try. docs/configuration.md has all settings.",
    ]
    values = {key: value for key, (value, _) in settings.items()}
    return yaml_text(values, {key: (why,) for key, (_, why) in settings.items()}, head)


def recipe_rows() -> list[dict[str, str]]:
    """Return a row about each recipe, for a list of them."""
    found = table()
    return [
        {
            "name": name,
            "base": recipe.base,
            "goal": recipe.goal,
            "gpus": recipe.machine,
        }
        for name, recipe in found.recipes.items()
    ]
