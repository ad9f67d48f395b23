"""Caches the architecture of a base, which transformers' model gives once for each config.json.

See trainer/base/describe/torch_answers.py.
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

# Settings that do not affect the model's parameters, and those of another head on the same model.
_IRRELEVANT = (
    *("quantization_config", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path"),
    *("id2label", "label2id", "problem_type", "classifier_dropout"),
)


def read_architecture(
    base_config: Mapping[str, Any], layers: int | None = None, *, name: str = "the base"
) -> Architecture:
    """The architecture of a base by its parsed config.json, cut to its first `layers`. Messages call it `name`.

    Raises:
        ConfigError: transformers has an unsupported version or does not know the base, or it is not a causal language
            model that can be trained.
    """
    check_transformers()
    settings = {key: value for key, value in base_config.items() if key not in _IRRELEVANT}
    return _read(json.dumps(settings, sort_keys=True), layers, name, user_cache())


@lru_cache(maxsize=64)
def _read(settings: str, layers: int | None, name: str, cache: Path) -> Architecture:
    if layers is not None and (cut := _read(settings, None, name, cache).first(layers)):
        return cut
    given = {"base_config": json.loads(settings), "layers": layers, "name": name}
    question = Question("base.describe.meta", "architecture_of", given, name, "reading the architecture")
    return kept_answer(question, [layers, settings], Architecture.from_json)


def read_adapter_paths(directory: Path, layers: int | None, paths: Sequence[str], name: str) -> dict[str, list[str]]:
    """Layer -> the paths that it may have in PEFT's folder of an adapter, beside the one in the language model alone.

    `directory` has the base's config.json. Raises `ConfigError` if transformers cannot tell."""
    given = {"directory": str(directory), "layers": layers, "paths": list(paths)}
    question = Question(
        "base.describe.language_model", "adapter_paths", given, name, "reading the names of the adapter's layers"
    )
    facts = [(directory / "config.json").read_text(), layers, given["paths"]]
    return kept_answer(question, facts, lambda found: {path: found[path] for path in paths})


@cache
def check_transformers() -> None:
    """Raises `ConfigError` if transformers' version is outside of the range that this distribution declares.

    Another version silently trains some families wrong. A machine without an installation of Capstan knows no range."""
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
