"""The architecture of a base by its config.json, read off transformers' model once
(trainer/base/describe/torch_answers.py).
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from trainer.base.architecture import Architecture
from trainer.base.describe.torch_answers import Question, kept_answer, user_cache
from trainer.errors import ConfigError

_DISTRIBUTION, _PACKAGE = "capstan-llm", "transformers"

# Settings that say nothing of the model's parameters.
_IRRELEVANT = ("quantization_config", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path")


def read_architecture(
    base_config: Mapping[str, Any], layers: int | None = None, *, name: str = "the base"
) -> Architecture:
    """The architecture of the base that messages call `name` by its parsed config.json; `layers` cuts it to its first
    so many.

    Raises:
        ConfigError: transformers is of an unsupported version or does not know it, or it is no causal language model
            that can be
            trained.
    """
    check_transformers()
    settings = {key: value for key, value in base_config.items() if key not in _IRRELEVANT}
    return _read(json.dumps(settings, sort_keys=True), layers, name, user_cache())


@lru_cache(maxsize=64)
def _read(settings: str, layers: int | None, name: str, _cache: Path) -> Architecture:
    given = {"base_config": json.loads(settings), "layers": layers, "name": name}
    question = Question("describe.meta", "architecture_of", given, name, "reading the architecture")
    return kept_answer(question, [layers, settings], Architecture.from_json)


def read_adapter_paths(directory: Path, layers: int | None, paths: Sequence[str], name: str) -> dict[str, list[str]]:
    """The paths that each of these layers of a base may have in PEFT's folder of an adapter, beside those in the
    language model alone; `directory` has its config.json. Raises `ConfigError` where transformers cannot say."""
    given = {"directory": str(directory), "layers": layers, "paths": list(paths)}
    question = Question("describe.composite", "adapter_paths", given, name, "reading the names of the adapter's layers")
    facts = [(directory / "config.json").read_text(), layers, given["paths"]]
    return kept_answer(question, facts, lambda found: {path: found[path] for path in paths})


@cache
def check_transformers() -> None:
    """Raises `ConfigError` where transformers is outside of the range that this distribution declares: another trains
    some families wrong without a word. A rank whose machine has no installation of Capstan itself knows none."""
    try:
        declared = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return
    allowed = next((part.specifier for part in declared if part.name == _PACKAGE), None)
    found = metadata.version(_PACKAGE)
    if allowed is not None and not allowed.contains(found, prereleases=True):
        raise ConfigError(
            f"{_PACKAGE} {found} is installed, and {allowed} is needed: with another, models may be trained wrong"
            f" without a word. Install it: pip install '{_PACKAGE}{allowed}'."
        )
