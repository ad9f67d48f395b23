"""The sets, tasks and pairs to evaluate a run on: finds them, and refuses bad ones before any rank starts.

Pairs are sentences that differ in the word for a group. Their gaps say how much likelier the model finds the first,
before and after training. No torch.
"""

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
from trainer.errors import NOT_JSON, ConfigError
from trainer.store import json_text
from trainer.tuning.objective import find_objective


def subjects(config: Config) -> list[str]:
    """Return the names of the sets, the tasks, and the file of pairs.

    Raises:
        ConfigError: there is nothing to evaluate, a file of pairs or of a task cannot be read, or the harness is not
            installed.
        DataError: a set's source is missing.
    """
    found = find_evaluated(config)
    unnamed = [UNNAMED] if UNNAMED in found and (has_likelihood(config) or config.objective.name in HEADS) else []
    if config.eval.tasks and find_spec("lm_eval") is None:
        raise ConfigError("eval.tasks: needs lm-evaluation-harness. Install it: pip install 'capstan-llm[tasks]'.")
    for task in config.eval.tasks:
        if Path(task).suffix in (".yaml", ".yml") and not local_path(task, "eval.tasks").is_file():
            raise ConfigError(
                f"eval.tasks: {task!r} does not exist. Give a task's name, a YAML file or a folder of them."
            )
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
