"""Answers that need torch and transformers, for processes that must answer quickly: above all a base's architecture.

Each answer takes a separate process some seconds. It is made once and kept in the user's cache. transformers' model
gives the architecture once for each config.json.

    <cache>/capstan/<function>/<hash>.json
    python -m trainer.base.describe.torch_answers < question > answer

The hash covers everything that decides an answer: the given facts, the versions of transformers and of the libraries
with which a base is tried, and the code that answers: of `trainer/base` and `trainer/model`, and all of `trainer` for
questions to other packages.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import cache, lru_cache
from importlib import import_module, metadata
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from packaging.requirements import Requirement

from trainer import errors
from trainer.base.architecture import Architecture
from trainer.errors import NOT_JSON, CapstanError, ConfigError
from trainer.processes import children
from trainer.processes.helper_thread import patiently

Parsed = TypeVar("Parsed")
_PACKAGES = ("transformers", "torch", "bitsandbytes")
_SECONDS = 300  # on a slow disk transformers' import takes most of it; the model itself is on `meta`


class Question(NamedTuple):
    """A function in a module of `trainer`, such as `base.describe.meta`, and its arguments. All are JSON.

    The answer is JSON too. `base` is the base's name in messages, and `doing` says what is happening in the meantime.
    """

    module: str
    function: str
    given: dict[str, Any]
    base: str
    doing: str


def user_cache() -> Path:
    """The folder of this machine for files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capstan"


def kept_answer(question: Question, facts: Any, parse: Callable[[Any], Parsed]) -> Parsed:
    """The answer, from the cache if it has one for these `facts`.

    `parse` may raise `LookupError`, `TypeError` or `AttributeError` for a tree that is not an answer.

    Raises:
        CapstanError: the function raised it.
        ConfigError: transformers cannot answer, or takes too long.
    """
    digest = hashlib.sha256(json.dumps([*map(version, _PACKAGES), facts]).encode() + _code(question.module)).hexdigest()
    path = user_cache() / question.function / f"{digest[:32]}.json"
    # An entry that is damaged, missing or half written is made again. All processes write the same entry.
    with suppress(OSError, *NOT_JSON, LookupError, TypeError, AttributeError):
        return parse(json.loads(path.read_bytes()))
    written = json.dumps(_answer(question) if "torch" in sys.modules else _answer_elsewhere(question))
    with suppress(OSError):  # a home folder that cannot be written costs only time
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written)
    return parse(json.loads(written))


@cache
def _code(module: str) -> bytes:
    """The code that decides an answer. A cache entry of other code does not count."""
    base, trainer = Path(__file__).parents[1:3]
    files = [*base.rglob("*.py"), *base.rglob("*.yaml"), *trainer.glob("model/*.py")]
    if not module.startswith("base."):
        files = [*trainer.rglob("*.py"), *base.rglob("*.yaml")]
    return b"".join(file.read_bytes() for file in sorted(files))


def _answer(question: Question) -> Any:
    return getattr(import_module(f"trainer.{question.module}"), question.function)(**question.given)


def _answer_elsewhere(question: Question) -> Any:
    print(f"{question.doing} with transformers, once for this base: this takes longest", file=sys.stderr)
    command = [sys.executable, "-m", "trainer.base.describe.torch_answers"]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # a compiler that is not needed is slow to import
    asked = json.dumps(question)
    try:
        with patiently(question.doing):
            result = children.run(
                command, input=asked, capture_output=True, text=True, timeout=_SECONDS, check=True, env=environment
            )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"model.base: transformers has not built the model of {question.base} within {_SECONDS} seconds. Try again."
        ) from error
    except subprocess.CalledProcessError as error:
        reason = next(reversed(error.stderr.strip().splitlines()), f"exit code {error.returncode}")
        raise ConfigError(
            f"model.base: transformers cannot build the model of {question.base} ({reason[:300]})."
        ) from error
    answer = json.loads(result.stdout)
    if "refusal" in answer:
        raise getattr(errors, answer["error"])(answer["refusal"])
    return answer["answer"]


_DISTRIBUTION, _PACKAGE = "capstan-llm", "transformers"

# Settings that do not affect the model's parameters.
_IRRELEVANT = ("quantization_config", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path")


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
def _read(settings: str, layers: int | None, name: str, _cache: Path) -> Architecture:
    given = {"base_config": json.loads(settings), "layers": layers, "name": name}
    question = Question("base.describe.meta", "architecture_of", given, name, "reading the architecture")
    return kept_answer(question, [layers, settings], Architecture.from_json)


def read_adapter_paths(directory: Path, layers: int | None, paths: Sequence[str], name: str) -> dict[str, list[str]]:
    """Layer -> the paths that it may have in PEFT's folder of an adapter, beside the one in the language model alone.

    `directory` has the base's config.json. Raises `ConfigError` if transformers cannot tell."""
    given = {"directory": str(directory), "layers": layers, "paths": list(paths)}
    doing = "reading the names of the adapter's layers"
    question = Question("base.describe.language_model", "adapter_paths", given, name, doing)
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


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # libraries may print anything
        try:
            said: dict[str, Any] = {"answer": _answer(Question(*json.load(sys.stdin)))}
        except CapstanError as refused:
            said = {"refusal": str(refused), "error": type(refused).__name__}
    json.dump(said, sys.stdout)
