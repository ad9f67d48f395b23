"""This file finds the sets, tasks and pairs to evaluate a run on, and refuses bad ones before any rank starts.

No torch.
"""

from importlib.util import find_spec
from pathlib import Path

from trainer.config import Config
from trainer.config.evaluation import UNNAMED
from trainer.config.objective import HEADS
from trainer.config.paths import local_path
from trainer.config.row_kinds import LIKELY
from trainer.data.compile.inputs import find_evaluated, named
from trainer.errors import ConfigError
from trainer.evaluate.measure.bias import read_pairs
from trainer.tuning.objective.objective import find_objective


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
