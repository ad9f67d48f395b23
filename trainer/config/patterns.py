"""Patterns of names, by which `tuning.targets` and `tuning.train` say what learns."""

import re
from collections.abc import Sequence
from fnmatch import translate

EXPRESSION = "re:"
"""The mark before a regular expression for whole names; without it a pattern is a text where * is any other."""


def is_pattern(text: str) -> bool:
    """Whether it stands for names other than itself."""
    return text.startswith(EXPRESSION) or any(wildcard in text for wildcard in "*?[")


def expression(pattern: str) -> re.Pattern[str]:
    """The expression that a whole name has to match."""
    return re.compile(pattern.removeprefix(EXPRESSION) if pattern.startswith(EXPRESSION) else translate(pattern))


def check_patterns(setting: str, patterns: str | Sequence[str]) -> None:
    """Raises `ValueError` with a sentence for what is no regular expression."""
    for pattern in [] if isinstance(patterns, str) else patterns:
        try:
            expression(pattern)
        except re.error as error:
            raise ValueError(
                f"{setting}: {pattern!r} is no regular expression ({error}). Example: 're:.*\\.(q|v)_proj.*'."
            ) from error
