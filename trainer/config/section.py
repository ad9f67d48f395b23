"""The base class of the configuration's sections, how a setting is declared in one, how a section gets those that a
folder has, and the patterns of names that `tuning.targets` and `tuning.train` take.

A method, an objective, or what a run does every so many steps names classes of its settings in `SETTINGS`.
trainer.config imports these files. So they import other sections of the configuration only for types, or in functions.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import translate
from typing import Annotated, Any, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator
from pydantic_core import PydanticCustomError

from trainer.config.registry import modules_of

# As seconds, these are 136 years: what Python's clocks and the C library still take.
_LARGEST = 2**32
# 8 in YAML 1.1 and in C, but 10 to whoever reads it, pydantic included.
_LEADING_ZERO = re.compile(r"[-+]?0[\d_]+")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _nothing_else_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = set(_kinds(cls.model_fields[info.field_name or ""].annotation))
        if kinds & {int, float} and bool not in kinds:
            for given in _scalars(value):
                if isinstance(given, bool) or (isinstance(given, str) and _LEADING_ZERO.fullmatch(given)):
                    raise PydanticCustomError("number", "Input should be a number, without zeros before it")
        return value

    @field_validator("*")
    @classmethod
    def _no_number_is_endless(cls, value: Any) -> Any:
        numbers = (given for given in _scalars(value) if isinstance(given, int | float))
        if not all(abs(number) <= _LARGEST for number in numbers):
            raise PydanticCustomError(
                "endless", "Numbers are finite here, and at most {largest}", {"largest": _LARGEST}
            )
        return value


def _scalars(value: Any) -> Iterator[Any]:
    """`value`, or what the lists and mappings in its place hold at any depth."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _scalars(item)
    elif isinstance(value, dict):
        yield from _scalars(list(value.values()))
    else:
        yield value


def _kinds(annotation: Any) -> Iterator[type]:
    """The types that a setting's annotation is made of, those of a Literal's values among them."""
    inside = get_args(annotation)
    for kind in inside:
        yield from _kinds(kind)
    if not inside:
        yield annotation if isinstance(annotation, type) else type(annotation)


def setting(default: Any = ..., *, about: str, example: Any, unit: str | None = None, **constraints: Any) -> Any:
    """One setting: what it is about, an example, and unless its type has them its unit and its bounds as pydantic knows
    them.
    """
    if unit:
        constraints["json_schema_extra"] = {"unit": unit}
    return Field(default, description=about, examples=[example], **constraints)


Seconds = Annotated[float, Field(gt=0, json_schema_extra={"unit": "seconds"})]
Steps = Annotated[int, Field(ge=0, json_schema_extra={"unit": "steps"})]
Rows = Annotated[int, Field(ge=1, json_schema_extra={"unit": "rows"})]
TokenCount = Annotated[int, Field(ge=1, le=2**20, json_schema_extra={"unit": "tokens"})]
Share = Annotated[float, Field(ge=0, lt=1, json_schema_extra={"unit": "share"})]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Multiple = Annotated[float, Field(gt=0, le=1000)]
Factor = Annotated[float, Field(gt=0, le=100)]

SectionKind = TypeVar("SectionKind", bound=Section)
PartKind = TypeVar("PartKind", bound=Section)


def with_parts(package: str) -> Callable[[type[SectionKind]], type[SectionKind]]:
    """A decorator for a section that also has the settings of each kind in `package`; `part` reads them with their
    types.
    """

    def complete(section: type[SectionKind]) -> type[SectionKind]:
        known = set(section.model_fields)
        parts = [part for module in modules_of(package) for part in getattr(module, "SETTINGS", ())]
        for part in parts:
            assert not known & part.model_fields.keys(), f"{part.__module__} declares a setting that is there already"
            known |= part.model_fields.keys()
        # pydantic lists the fields of the last base first.
        bases = (*reversed(parts), section)
        name, module, doc = section.__name__, section.__module__, section.__doc__
        return cast(type[SectionKind], create_model(name, __base__=bases, __module__=module, __doc__=doc))

    return complete


def part(section: Section, kind: type[PartKind]) -> PartKind:
    """The same section, as the one that has the settings of `kind`."""
    assert isinstance(section, kind)
    return section


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
