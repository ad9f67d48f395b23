"""The range of transformers that this distribution declares: outside of it some families train wrong without a word."""

from functools import cache
from importlib import metadata

from packaging.requirements import Requirement

from trainer.errors import ConfigError

_DISTRIBUTION, _PACKAGE = "capstan-llm", "transformers"


@cache
def check_transformers() -> None:
    """Raises `ConfigError` where transformers is outside of the range. A rank whose machine has no installation of Capstan itself knows none."""
    try:
        declared = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return
    allowed = next((part.specifier for part in declared if part.name == _PACKAGE), None)
    found = metadata.version(_PACKAGE)
    if allowed is not None and not allowed.contains(found, prereleases=True):
        raise ConfigError(
            f"{_PACKAGE} {found} is installed, and {allowed} is needed: with another, models may be trained wrong without a word. "
            f"Install it: pip install '{_PACKAGE}{allowed}'."
        )
