"""The architectures of bases in the user's cache: each is read off transformers' model once, some seconds in a process of its own.

    <cache>/capstan/architectures/<hash>.json

What decides the architecture is in the hash: config.json, the number of layers, transformers' version and the code that reads it.
Code that must answer at once, such as `plan`, loads no torch for it.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.base.architecture import Architecture
from trainer.errors import NOT_JSON, ConfigError

_SECONDS = 300  # transformers' import takes most of it on a slow disk; the model itself is on `meta`
# Settings that say nothing of the model's parameters.
_IRRELEVANT = ("quantization_config", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path")
_CODE = (
    "base/architecture.py",
    "base/logits.py",
    "base/meta.py",
    "base/unfilled.py",
    "model/experts.py",
    "model/parts.py",
)
_NOTICE = "reading the architecture with transformers, once for this base"


def read_architecture(
    base_config: Mapping[str, Any], layers: int | None = None, *, name: str = "the base"
) -> Architecture:
    """The architecture of the base that messages call `name` by its parsed config.json; `layers` cuts it to its first so many.

    Raises:
        ConfigError: transformers does not know it, or it is no causal language model that can be trained.
    """
    settings = {key: value for key, value in base_config.items() if key not in _IRRELEVANT}
    return _kept(json.dumps(settings, sort_keys=True), layers, name, cache_folder())


def user_cache() -> Path:
    """Where this machine keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capstan"


def cache_folder() -> Path:
    return user_cache() / "architectures"


@lru_cache(maxsize=64)
def _kept(settings: str, layers: int | None, name: str, folder: Path) -> Architecture:
    facts = json.dumps([version("transformers"), layers, settings]).encode()
    path = folder / f"{hashlib.sha256(facts + _code()).hexdigest()[:32]}.json"
    # An entry that is damaged, or not there, is made again.
    with suppress(OSError, *NOT_JSON, LookupError, TypeError, AttributeError):
        return Architecture.from_json(json.loads(path.read_bytes()))
    found = _read(settings, layers, name)
    with suppress(OSError):  # a home that cannot be written to costs time, and nothing else
        _write(path, json.dumps(found.to_json()).encode())
    return found


def _code() -> bytes:
    """The source of what reads and writes an architecture: an entry of another version is none."""
    return b"".join((Path(__file__).parents[1] / name).read_bytes() for name in _CODE)


def _read(settings: str, layers: int | None, name: str) -> Architecture:
    if "torch" in sys.modules:
        return import_module("trainer.base.meta").read_from_meta(json.loads(settings), layers, name)
    return _read_elsewhere(json.dumps({"config": json.loads(settings), "layers": layers, "name": name}), name)


def _read_elsewhere(request: str, name: str) -> Architecture:
    print(_NOTICE, file=sys.stderr)
    command = [sys.executable, "-m", "trainer.base.meta"]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # a compiler that is not needed is slow to import
    try:
        result = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=_SECONDS, check=True, env=environment
        )
        answer = json.loads(result.stdout)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"model.base: transformers has not built the model of {name} within {_SECONDS} seconds. Try again."
        ) from error
    except subprocess.CalledProcessError as error:
        reason = next(reversed(error.stderr.strip().splitlines()), f"exit code {error.returncode}")
        raise ConfigError(f"model.base: transformers cannot build the model of {name} ({reason[:300]}).") from error
    if "refusal" in answer:
        raise ConfigError(answer["refusal"])
    return Architecture.from_json(answer["architecture"])


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing; others may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
