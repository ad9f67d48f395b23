"""What every section of the configuration is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def setting(default: Any = ..., *, about: str, example: Any, unit: str | None = None, **constraints: Any) -> Any:
    """One setting: what it is about, an example, its unit, and its bounds as pydantic knows them."""
    extra: dict[str, Any] | None = {"unit": unit} if unit else None
    return Field(default, description=about, examples=[example], json_schema_extra=extra, **constraints)
