"""The sets, tasks and pairs to evaluate a run on: finds them, and refuses bad ones before any rank starts.

Pairs are sentences that differ in the word for a group. Their gaps say how much likelier the model finds the first,
before and after training. No torch.
"""

import os
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from trainer.config import Config
from trainer.config.evaluation import UNNAMED
from trainer.config.objective import HEADS
from trainer.config.paths import local_path, text_lines
from trainer.config.row_kinds import LIKELY
from trainer.data.compile.inputs import find_evaluated, named
from trainer.errors import NOT_JSON, ConfigError, few
from trainer.store import json_text
from trainer.tuning.objective import find_objective


def subjects(config: Config) -> list[str]:
    """Return the names of the sets, the tasks, and the file of pairs.

    Raises:
        ConfigError: there is nothing to evaluate, a file of pairs cannot be read, a task does not exist, or the harness
            is not installed.
        DataError: a set's source is missing.
    """
    found = find_evaluated(config)
    unnamed = [UNNAMED] if UNNAMED in found and (has_likelihood(config) or config.objective.name in HEADS) else []
    if config.eval.tasks:
        _check_tasks(config.eval.tasks)
    if config.eval.bias:
        read_pairs(config.eval.bias)
    every = [
        *unnamed,
        *named(dict.fromkeys(found, "")),
        *config.eval.tasks,
        *([config.eval.bias] if config.eval.bias else []),
    ]
    if not every:
        raise ConfigError(
            "there is nothing to evaluate: set data.eval, data.held_out, eval.sets, eval.tasks or eval.bias, or name a"
            " set with --set NAME=PATH."
        )
    return every


def _check_tasks(tasks: Sequence[str]) -> None:
    harness = find_spec("lm_eval")
    if harness is None:
        raise ConfigError("eval.tasks: needs lm-evaluation-harness. Install it: pip install 'capstan-llm[tasks]'.")
    for task in tasks:
        if Path(task).suffix in (".yaml", ".yml") and not local_path(task, "eval.tasks").is_file():
            raise ConfigError(
                f"eval.tasks: {task!r} does not exist. Give a task's name, a YAML file or a folder of them."
            )
    names = [name for name in task_specs(tasks) if not Path(name).is_file()]
    if unknown := _unknown(names, [Path(folder, "tasks") for folder in harness.submodule_search_locations or ()]):
        raise ConfigError(
            f"eval.tasks: lm-evaluation-harness has no task {few([*map(repr, unknown)])}, and no such file is here."
            " `lm-eval ls tasks` lists its tasks."
        )


def task_specs(names: Sequence[str]) -> list[str]:
    """Return names of tasks as they are, and the YAML files of folders one by one.

    Raises `ConfigError` for a folder without any.
    """
    specs = list[str]()
    for name in names:
        path = Path(local_path(name, "eval.tasks"))
        if path.is_dir():
            files = sorted(str(file) for file in path.glob("*.yaml") if not file.name.startswith("_"))
            if not files:
                raise ConfigError(f"eval.tasks: {name!r} holds no .yaml file.")
            specs += files
        else:
            specs.append(str(path) if path.is_file() else name)
    return specs


def _unknown(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Return those `names` that no file in the harness's `folders` mentions, so no task, group or tag has them.

    The harness itself takes ten seconds and more to parse its 14,000 files.
    """
    left = {name: re.compile(rb"(?<![^\s\"'\[,:])%s(?![^\s\"'\],#])" % re.escape(name.encode())) for name in names}
    files = (Path(folder, file) for root in folders for folder, _, inside in os.walk(root) for file in inside)
    for file in files:
        if not left:
            break
        if file.suffix not in (".py", ".pyc", ".md"):
            text = file.read_bytes()
            left = {name: word for name, word in left.items() if not word.search(text)}
    return [*left]


def has_likelihood(config: Config) -> bool:
    """Return whether the rows of the run's own data have a likelihood. Answers to be judged have none of their own."""
    return set(find_objective(config).formats) <= set(LIKELY)


class SentencePair(NamedTuple):
    """Two sentences, and the group that they are counted with."""

    group: str
    first: str
    second: str


class Gaps(NamedTuple):
    """Mean and standard deviation, over the pairs of a group, of log p(first) - log p(second) in nats."""

    mean: float
    std: float


def read_pairs(path: str) -> list[SentencePair]:
    """Read the pairs of the JSONL file of `eval.bias`, whose rows are {"group": "...", "pair": ["...", "..."]}.

    Raises:
        ConfigError: the file cannot be read, or a row is something else.
    """
    pairs = [_pair(line, f"eval.bias: {path}:{number}") for number, line in text_lines(path, "eval.bias")]
    if not pairs:
        raise ConfigError(f"eval.bias: {path!r} holds no pair.")
    return pairs


def _pair(line: str, where: str) -> SentencePair:
    try:
        row = json_text.loads(line)
        (first, second), group = row["pair"], row["group"]
    except (*NOT_JSON, KeyError, TypeError) as error:
        raise ConfigError(f'{where}: a row is {{"group": "...", "pair": ["...", "..."]}}.') from error
    if not all(isinstance(value, str) and value for value in (first, second, group)):
        raise ConfigError(f"{where}: group and both sentences are texts, and not empty.")
    return SentencePair(group, first, second)


def gaps_of(pairs: Sequence[SentencePair], log_p: Sequence[float]) -> dict[str, Gaps]:
    """Return the gaps by group. The input alternates log p of the first and of the second sentence of each pair."""
    found: dict[str, list[float]] = {}
    for number, pair in enumerate(pairs):
        found.setdefault(pair.group, []).append(log_p[2 * number] - log_p[2 * number + 1])
    return {group: Gaps(statistics.fmean(values), statistics.pstdev(values)) for group, values in found.items()}


def gaps_as_json(pairs: Sequence[SentencePair], sides: Mapping[str, Mapping[str, Gaps]]) -> dict[str, object]:
    """Return JSON of `sides`, the gaps before and after by their names."""
    counts = Counter(pair.group for pair in pairs)
    return {
        group: {"pairs": count, **{side: found[group]._asdict() for side, found in sides.items()}}
        for group, count in counts.items()
    }
