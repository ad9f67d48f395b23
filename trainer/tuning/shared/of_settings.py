"""The common part of methods that are made from the section `tuning` alone: their identity, and how they are switched off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.config import Tuning
from trainer.config.registry import without_defaults
from trainer.tuning.method import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class OfSettings(Method):
    """A method whose identity are its settings. The modules that it adds, and those of what learns beside it, have a flag `active`;
    where others learn, it says itself how it is switched off."""

    tuning: Tuning

    @property
    def identity(self) -> dict[str, Any]:
        given = self.tuning.model_dump(mode="json", include={"method", *self.settings})
        return without_defaults(given, self.defaults)

    def switched_off(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        # A token that was added keeps the row that it started as: the base has none for it.
        return flagged([module for module in model.modules() if "active" in vars(module)], "active", False)


@contextmanager
def flagged(layers: Iterable[Any], flag: str, value: bool) -> Iterator[None]:
    """Every layer's attribute `flag` is `value` inside, and the opposite afterwards."""
    layers = list(layers)
    for layer in layers:
        setattr(layer, flag, value)
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, flag, not value)
