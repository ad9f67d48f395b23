"""The base class of the configuration's sections, and the function that declares a setting in them."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

# As seconds, these are 136 years: what Python's clocks and the C library still take.
_LARGEST = 2**32


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _no_number_is_endless(cls, value: Any) -> Any:
        if not all(abs(number) <= _LARGEST for number in _numbers(value)):
            raise PydanticCustomError(
                "endless", "Numbers are finite here, and at most {largest}", {"largest": _LARGEST}
            )
        return value


def _numbers(value: Any) -> Iterator[float]:
    """Every number in `value`, and in the lists and mappings that it holds."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))


def setting(default: Any = ..., *, about: str, example: Any, unit: str | None = None, **constraints: Any) -> Any:
    """One setting: what it is about, an example, its unit, and its bounds as pydantic knows them."""
    extra: dict[str, Any] | None = {"unit": unit} if unit else None
    return Field(default, description=about, examples=[example], json_schema_extra=extra, **constraints)
