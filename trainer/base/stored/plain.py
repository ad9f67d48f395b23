"""Bases that are stored in the types in which they compute, in 16 or 32 bits."""

from collections.abc import Mapping
from typing import Any, ClassVar

from trainer.base.base import Base, StoredFormat
from trainer.store.safetensors_index import StoredTensor


class PlainFiles(StoredFormat):
    """Every weight is a separate tensor. If it is quantized, that happens on the way into memory."""

    readable: ClassVar[str] = "16 and 32 bits"
    decoded: ClassVar[bool] = False

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        """Whether config.json has no quantization_config, or an empty one."""
        return not quantization

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        return base.tensors


STORED: dict[str, type[StoredFormat]] = {"plain": PlainFiles}
