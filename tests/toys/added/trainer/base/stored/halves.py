"""A toy stored format: the files hold half of each value, in 32 bits, which is doubled as it is read."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trainer.base.base import Base, StoredFormat
from trainer.store.safetensors_index import StoredTensor


@dataclass(frozen=True)
class Doubled:
    """A tensor whose values are twice the stored ones."""

    stored: StoredTensor
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self, begin: int, end: int) -> bytearray:
        count = end - begin
        values = struct.unpack(f"<{count}f", self.stored.read(begin, end))
        return bytearray(struct.pack(f"<{count}f", *(2 * value for value in values)))


class Halves(StoredFormat):
    readable: ClassVar[str] = "halves"
    unmergeable: ClassVar[str | None] = "stored in halves, where no new weight fits"

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == "halves"

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        return {name: Doubled(tensor) for name, tensor in base.tensors.items()}


STORED: dict[str, type[StoredFormat]] = {"halves": Halves}
