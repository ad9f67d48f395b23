"""The machine and the packages that a start runs on, as environment.json and the manifests record them."""

import json
import platform
import socket
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from trainer.processes.ranks import Ranks

_PACKAGES = ("capstan-llm", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "ray", "obstore")


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide what a run computes.

    A package that is not installed is left out: a rank that torchrun started needs no Ray, and a checkout may run
    without an installation.
    """
    return {name: found for name in _PACKAGES if (found := _version(name))}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(ranks: Ranks) -> bytes:
    """Return the content of environment.json, which rank 0 writes."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "device": ranks.device_name,
        "world_size": ranks.world_size,
        "versions": versions(),
    }
    return json.dumps(facts, indent=1).encode()
