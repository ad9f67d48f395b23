"""Bases stored as they compute, in 16 or 32 bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from trainer.base.base import Base
from trainer.config import Config
from trainer.safetensors_index import StoredTensor


@dataclass(frozen=True)
class Plain:
    """Every weight is a tensor; it is quantized on the way into memory, if at all."""

    unmergeable: ClassVar[str | None] = None
    quantized: ClassVar[bool] = False
    decoded: ClassVar[bool] = False

    def mismatches(self, config: Config) -> list[str]:
        return []

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        return base.tensors

    def check(self, base: Base, config: Config) -> None:
        pass
