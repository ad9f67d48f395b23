"""The recipes of recipes.yaml, the configuration that each becomes, and small data for a first try.

The data is one file for each kind of rows, made from a glossary of words of sailing. The rows are the same on every
machine and at every time.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict

from launcher.init.commented import yaml_text
from trainer.errors import ConfigError, shown

FOLDER = "sample-data"

_QUESTIONS = (
    "What does the word “{term}” mean on board?",
    "I am new to sailing. Please explain “{term}”.",
    "Which word of sailing is this: {meaning}?",
)
_CREWS, _LINES, _HOURS = range(2, 12), (3, 5, 7, 9), range(2, 8)


class Term(NamedTuple):
    """A word, what it is about, and its meaning."""

    topic: str
    term: str
    meaning: str

    @property
    def sentence(self) -> str:
        return f"On board, “{self.term}” means {self.meaning}."


def glossary() -> list[Term]:
    topics = yaml.safe_load(Path(__file__).with_name("glossary.yaml").read_text(encoding="utf-8"))
    return [Term(topic, term, meaning) for topic, words in topics.items() for term, meaning in words.items()]


def write_data(folder: Path, *, force: bool) -> list[str]:
    """Write the files into `folder`, and return a line about each.

    Raises:
        ConfigError: one of them is there already, unless `force`, or they cannot be written.
    """
    taken = [name for name in FILES if (folder / name).exists()]
    if taken and not force:
        raise ConfigError(f"--data: {folder / taken[0]} exists already. Give another folder, or --force to replace it.")
    told = list[str]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (about, rows) in FILES.items():
            lines = [json.dumps(row, ensure_ascii=False) for row in rows()]
            (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            told.append(f"{folder / name}: {len(lines)} rows, {about}")
    except OSError as error:
        raise ConfigError(f"--data: {folder} cannot be written: {error}.") from error
    return told


def _asked(entry: Term) -> Iterator[tuple[str, str]]:
    """Yield questions about a word, each with its answer."""
    answers = (entry.sentence, entry.sentence, f"It is “{entry.term}”.")
    for question, answer in zip(_QUESTIONS, answers, strict=True):
        yield question.format(term=entry.term, meaning=entry.meaning), answer


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _chat() -> Iterator[Any]:
    for entry in glossary():
        for question, answer in _asked(entry):
            yield {"messages": [_message("user", question), _message("assistant", answer)]}


def _completions() -> Iterator[Any]:
    for entry in glossary():
        yield {"prompt": f"{entry.term}: ", "completion": f"{entry.meaning}\n"}
        yield {"prompt": f"Topic of “{entry.term}”: ", "completion": f"{entry.topic}\n"}


def _pairs() -> Iterator[Any]:
    """Yield pairs of answers: the right one, and one that talks around it or is another word's."""
    every = glossary()
    for number, entry in enumerate(every):
        other = every[(number + 7) % len(every)]
        wrong = (
            f"Good question! There is much to say about “{entry.term}”, and it depends on whom you ask. In short, it is"
            " a word of sailing.",
            f"On board, “{entry.term}” means {other.meaning}.",
        )
        for question, rejected in zip(_QUESTIONS[:2], wrong, strict=True):
            yield {
                "prompt": [_message("user", question.format(term=entry.term, meaning=entry.meaning))],
                "chosen": [_message("assistant", entry.sentence)],
                "rejected": [_message("assistant", rejected)],
            }


def _classes() -> Iterator[Any]:
    for entry in glossary():
        yield {"text": entry.sentence, "label": entry.topic}
        yield {"text": f"{entry.term}: {entry.meaning}", "label": entry.topic}


def _tasks() -> Iterator[Any]:
    """Yield sums in words, whose answers a program can check."""
    for crew in _CREWS:
        for lines in _LINES:
            yield _task(f"A crew of {crew} hauls {lines} lines each. How many lines is that?", crew * lines)
        for hours in _HOURS:
            yield _task(f"A boat makes {crew} knots for {hours} hours. How many miles is that?", crew * hours)


def _task(question: str, number: int) -> dict[str, Any]:
    asked = f"{question} Answer with the number alone."
    return {"messages": [_message("user", asked), _message("assistant", str(number))]}


def _long() -> Iterator[Any]:
    """Yield whole texts, one about each topic, and one about all of them."""
    texts: dict[str, list[str]] = {}
    for entry in glossary():
        texts.setdefault(entry.topic, []).append(entry.sentence)
    chapters = [f"About the {topic}. {' '.join(sentences)}" for topic, sentences in texts.items()]
    for text in (*chapters, "\n\n".join(chapters)):
        yield {"text": text}


FILES: dict[str, tuple[str, Callable[[], Iterator[Any]]]] = {
    "chat.jsonl": ("conversations about sailing terms", _chat),
    "completion.jsonl": ("prompts with their completions", _completions),
    "pairs.jsonl": ("prompts with a chosen and a rejected answer", _pairs),
    "classes.jsonl": ("texts with the topic that they are about", _classes),
    "tasks.jsonl": ("sums whose answers can be checked", _tasks),
    "long.jsonl": ("whole texts", _long),
}
"""File -> what its rows are, and a function that yields them."""


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
