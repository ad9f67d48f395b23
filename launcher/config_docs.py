"""Writes docs/configuration.md from the models in trainer/config/.

python -m launcher.config_docs            write the page
python -m launcher.config_docs --check    exit 1 when the page is not what would be written
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, Union, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config import Config, Tuning
from trainer.config.registry import one_of
from trainer.state.optimizer import optimizers
from trainer.tuning.method import methods_reading

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

_HEADER = """\
# Configuration

<!-- Written by `python -m launcher.config_docs` from trainer/config/: change the settings there. -->

The configuration of a run is one YAML file. You can override any setting on the command line, with its dotted name and
a YAML value: `capstan train run.yaml train.steps=20 tuning.targets=[q_proj,v_proj]`. If you override a setting twice,
the last value counts. If an override contradicts a different setting of the file (`train.epochs=2` contradicts
`train.steps`), Capstan drops the setting of the file, and prints a line about it.

Capstan refuses an unknown setting and names the nearest known one. It also refuses a file that has the same key twice.
`capstan config schema` prints the JSON Schema, with which an editor can complete settings.
"""

_TABLE = "| Setting | Allowed | Default | Unit | What it does | Example |\n| --- | --- | --- | --- | --- | --- |"

_NAMES: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "value"}
_BOUNDS = {
    "ge": "≥ {}",
    "gt": "> {}",
    "le": "≤ {}",
    "lt": "< {}",
    "min_length": "(at least {})",
    "pattern": "matching `{}`",
}


def render() -> str:
    """Return the whole page as Markdown: a heading and a table for each section, in the order of the models."""
    parts = [_HEADER]
    for name, model in _sections(Config, ""):
        plain = [(key, field) for key, field in model.model_fields.items() if not _is_section(field.annotation)]
        if plain:
            rows = "\n".join(_row(f"{name}.{key}", field) for key, field in plain)
            parts.append(f"## {name}\n\n{inspect.getdoc(model)}\n\n{_TABLE}\n{rows}\n")
    return "\n".join(parts)


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield every section below `model`, depth first, each model once.

    Sections of a list are named `data.train[]`, and those that have names `eval.sets.NAME`.
    """
    seen: set[type[BaseModel]] = set()
    for key, field in model.model_fields.items():
        name = f"{prefix}{key}"
        annotation: Any = field.annotation
        if get_origin(annotation) is list:
            (annotation,) = get_args(annotation)
            name += "[]"
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
            name += ".NAME"
        if _is_section(annotation) and annotation not in seen:
            seen.add(annotation)
            yield name, annotation
            yield from _sections(annotation, f"{name}.")


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _row(name: str, field: FieldInfo) -> str:
    extra = cast(dict[str, str] | None, field.json_schema_extra) or {}
    default = "required" if field.is_required() else _value(field.get_default())
    example = _value((field.examples or [""])[0])
    kinds = ". ".join(f"{kind}: {words}" for one in one_of(field) for kind, words in one.about().items() if words)
    about = f"{field.description or ''} {kinds}.".removesuffix(" .") + _read_by(name)
    cells = (f"`{name}`", _allowed(field), default, extra.get("unit", ""), about, example)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _read_by(name: str) -> str:
    """Return a sentence on the methods and optimizers that read the setting, if others do not."""
    section, _, key = name.partition(".")
    readers = methods_reading(key if section == "tuning" else name, Tuning())
    if section == "optim":
        readers += [optimizer for optimizer, kind in optimizers().items() if key in kind.settings]
    return f" Read by {', '.join(sorted(readers))}." if readers else ""


def _allowed(field: FieldInfo) -> str:
    """Return the type of a field and its bounds, in words: `whole number ≥ 1`."""
    limits = ", ".join(filter(None, map(_limit, field.metadata)))
    named = ", ".join(f"`{name}`" for one in one_of(field) for name in one.about())
    if named:
        return f"list of {named}" if get_origin(field.annotation) is list else named
    return f"{_type(field.annotation)} {limits}".strip()


def _limit(rule: Any) -> str:
    """Return one of pydantic's constraints (annotated_types), such as Ge(ge=1), in words."""
    given = ((words, getattr(rule, name, None)) for name, words in _BOUNDS.items())
    return next((words.format(bound) for words, bound in given if bound is not None), "")


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_type(argument) for argument in arguments if argument is not NoneType)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is list:
        return f"list of {_plural(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} {_plural(arguments[0])}"
    if origin is dict:
        return f"{_plural(arguments[0])} to {_plural(arguments[1])}"
    return _NAMES[annotation]


def _plural(annotation: Any) -> str:
    if _is_section(annotation):
        return f"{re.sub('(?<=[a-z])(?=[A-Z])', ' ', annotation.__name__).lower()}s, see below"
    if get_origin(annotation) in (Literal, list):
        return _type(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_plural, get_args(annotation)))
    name = _NAMES[annotation]
    return name if name == "text" else f"{name}s"


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def write_or_check(page: Path, render: Callable[[], str], module: str, source: str) -> int:
    """Run the command of a page that is written from `source`. Returns the exit code.

    `python -m module` writes the page. With --check the page is compared.
    """
    name = page.relative_to(page.parents[1])
    parser = argparse.ArgumentParser(description=f"Write {name} from {source}.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    if not parser.parse_args().check:
        page.write_text(render(), encoding="utf-8")
        return 0
    if page.is_file() and page.read_text(encoding="utf-8") == render():
        return 0
    print(f"{name} is out of date. Run: .venv/bin/python -m {module}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, render, "launcher.config_docs", "trainer/config/"))
