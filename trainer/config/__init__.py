"""The run's configuration: one tree of models, read from YAML, with dotted overrides (`train.steps=20`).

Every field has a unit (where it has one), a description and an example; `docs/configuration.md` is generated from them.
A setting that would be ignored is an error, an unknown key is refused with the nearest name.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from trainer.config.cluster import Slurm
from trainer.config.data import Data
from trainer.config.evaluation import EvalSet, Evaluation
from trainer.config.model import Model, Quant, Tuning
from trainer.config.objective import ObjectiveSettings
from trainer.config.reading import apply_overrides, explained, listed, read_yaml, unknown_keys, without_retired
from trainer.config.run import Checkpoint, Retry, Timeouts
from trainer.config.source import Source
from trainer.config.training import Optim, Train
from trainer.config.tree import Config, fields
from trainer.errors import ConfigError, shown

__all__ = [
    "Checkpoint",
    "Config",
    "Data",
    "EvalSet",
    "Evaluation",
    "Model",
    "ObjectiveSettings",
    "Optim",
    "Quant",
    "Retry",
    "Slurm",
    "Source",
    "Timeouts",
    "Train",
    "Tuning",
    "assignment",
    "dump_config",
    "fields",
    "load_config",
    "override",
    "parse_config",
    "parse_options",
    "unsaid",
]

SectionKind = TypeVar("SectionKind", bound=BaseModel)


def unsaid(_sentence: str) -> None:
    """Keep a sentence to oneself, where nobody would read it."""


def load_config(path: str | Path, overrides: Sequence[str] = (), say: Callable[[str], None] = unsaid) -> Config:
    """Read a YAML file, apply `key.path=value` overrides (values are YAML; the last of one key counts), and validate.

    An override replaces what it contradicts, such as train.epochs a train.steps of the file; `say` gets a sentence
    about it.

    Raises:
        ConfigError: the file is missing or not YAML, or a setting is unknown, missing or wrong. All are named at once.
    """
    try:
        text = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration {shown(str(path))} cannot be read: {error}.") from error
    return parse_config(text, overrides, str(path), say)


def parse_config(
    text: str | bytes,
    overrides: Sequence[str] = (),
    name: str = "config",
    say: Callable[[str], None] = unsaid,
) -> Config:
    """Like `load_config`, from the YAML text itself."""
    tree = read_yaml(text, name)
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} is not a configuration: its top level must be sections such as 'run:' and 'model:'.")
    apply_overrides(tree, overrides, name, say)
    return _validated(Config, tree)


def parse_options(kind: type[SectionKind], given: Sequence[str]) -> SectionKind:
    """The settings of `kind` from `key=value` options, for a command that takes some of its own. Raises `ConfigError`
    as `load_config`."""
    tree: dict[str, Any] = {}
    apply_overrides(tree, given, "the options", unsaid)
    return _validated(kind, tree)


def _validated(kind: type[SectionKind], tree: dict[str, Any]) -> SectionKind:
    tree = without_retired(tree)
    unknown = list(unknown_keys(tree, kind, ""))
    if unknown:
        raise ConfigError(listed(unknown))
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(listed([*explained(error.errors(), kind)])) from error


def dump_config(config: Config) -> str:
    """The YAML text of `config`, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def override(config: Config, *overrides: str) -> Config:
    """A copy of `config` with dotted overrides applied and validated again. `quant` and `model.dtype`, which are
    decided later, stay open if nothing was said of them.
    """
    left_open: dict[str, Any] = {} if config.quant.model_fields_set else {"quant": True}
    if "dtype" not in config.model.model_fields_set:
        left_open["model"] = {"dtype"}
    tree = config.model_dump(mode="json", exclude=left_open)
    return parse_config(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), overrides)


def assignment(key: str, value: Any) -> str:
    """The override that gives the setting `key` this very value, which need not be YAML text: a path may hold `: ` or `
    #`.
    """
    return f"{key}={yaml.safe_dump(value, default_flow_style=True)}"
