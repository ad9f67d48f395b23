"""Settings as a commented YAML configuration, in the order of ours, and the file that it becomes."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher.view.terminal import visible
from trainer.config import fields
from trainer.errors import ConfigError, shown

_COLUMN = 44
_WIDTH = 120


def yaml_text(
    settings: Mapping[str, Any], comments: Mapping[str, Sequence[str]], head: Sequence[str], foot: Sequence[str] = ()
) -> str:
    """Return the configuration with these dotted settings. `head` and `foot` are lines of comment around it."""
    order = {name: index for index, (name, _) in enumerate(fields())}
    lines = [_comment(line) for line in head]
    opened: list[str] = []
    for setting in sorted(settings, key=lambda name: order.get(name, len(order))):
        *sections, leaf = setting.split(".")
        shared = 0
        while shared < len(sections) and opened[: shared + 1] == sections[: shared + 1]:
            shared += 1
        lines += [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections) if depth >= shared]
        opened = sections
        indent = "  " * len(sections)
        lines += _lines(f"{indent}{leaf}", settings[setting], "; ".join(comments.get(setting, ())))
    return "\n".join([*lines, *(_comment(line) for line in foot)]) + "\n"


def _comment(line: str) -> str:
    return f"# {visible(' '.join(line.splitlines()))}".rstrip()


def check_new(path: Path, force: bool) -> None:
    """Raise `ConfigError` if `path` is taken, unless `force`, or if it cannot be a file."""
    try:
        there, fits = path.exists(), path.parent.is_dir() and not path.is_dir()
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"{shown(str(path))} cannot be written: {error.strerror}.") from error
    if not fits:
        raise ConfigError(
            f"{shown(str(path))} cannot be written: its folder must exist, and it must not be a folder itself."
        )
    if there and not force:
        raise ConfigError(f"{path} exists already. Give another name, or --force to replace it.")


def write_new(path: Path, text: str) -> None:
    """Write a configuration that `check_new` accepted."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}.") from error


def _lines(name: str, value: Any, comment: str) -> list[str]:
    """Return the lines of one setting: a value on one line, or a list of sources with one on each."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        indent = " " * (len(name) - len(name.lstrip()) + 2)
        return [*_commented(f"{name}:", comment), *(f"{indent}- {_flow(item)}" for item in value)]
    return _commented(f"{name}: {_flow(value)}", comment)


def _flow(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
        .removesuffix("...\n")
        .strip()
    )


def _commented(line: str, comment: str) -> list[str]:
    """Return the line with the comment behind it, or below the comment if that is too long for one line."""
    if not comment:
        return [line]
    words = visible(" ".join(comment.split()))
    if max(_COLUMN, len(line) + 2) + 2 + len(words) <= _WIDTH:
        return [f"{line:<{_COLUMN}}  # {words}"]
    indent = " " * (len(line) - len(line.lstrip()))
    return [*textwrap.wrap(words, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "), line]
