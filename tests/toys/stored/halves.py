"""A toy stored format: each matrix is stored as half of its values, and doubled as it is read. One file, as
trainer/base/base.py wants it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trainer.base.base import Base, QuantizedBy
from trainer.config import Config
from trainer.files.safetensors_index import StoredTensor


@dataclass(frozen=True)
class Doubled:
    """One tensor of a base, whose values are twice the stored ones. It is in 32 bits."""

    stored: StoredTensor
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self, begin: int, end: int) -> bytearray:
        """The bytes of elements [begin, end)."""
        data = self.stored.read(begin, end)
        values = struct.unpack(f"<{end - begin}f", data)
        return bytearray(struct.pack(f"<{end - begin}f", *(2 * value for value in values)))


