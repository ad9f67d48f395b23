"""Bases stored as they compute, in 16 or 32 bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from trainer.base.base import Base, StoredWeights
from trainer.base.parameters import find_source
from trainer.config import Config
from trainer.safetensors_index import StoredTensor


@dataclass(frozen=True)
class Plain:
    """One tensor a parameter, or one an expert; quantized on the way into memory, if at all."""

    unmergeable: ClassVar[str | None] = None
    quantized: ClassVar[bool] = False
    decoded: ClassVar[bool] = False

    def mismatches(self, config: Config) -> list[str]:
        return []

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        return base.tensors

    def check(self, base: Base, config: Config) -> None:
        for name, shape in base.architecture.quantizable().items():
            find_source(base, name, shape)

    def open(self, base: Base, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> StoredWeights:
        sources = {name: find_source(base, name, shape) for name, shape in shapes.items()}
        names = base.architecture.stored_names
        return StoredWeights(sources, {stored for name in shapes for stored in (name, *names(name))})
