"""How a weight in 4 or 8 bits is coded in files: which numbers its codes are, and which weights share a scale.

Facts only, without numpy and torch: trainer/base/stored/shared/coded.py decodes as files are read, formats/stored.py
when a layer computes."""

from dataclasses import dataclass
from math import ceil, ldexp, nan, prod
from typing import Literal, Protocol, runtime_checkable

from trainer.store.safetensors_index import DTYPE_BYTES, PackedSources, StoredTensor

Numbers = Literal["e2m1", "e4m3", "int4", "int8", "offset8"]
Seconds = Literal["none", "times", "over"]
"""Whether the scales of a matrix are multiplied or divided by one fp32 number."""


def _e4m3(code: int) -> float:
    """The number of a byte: a sign, 4 bits of exponent, 3 of mantissa, and no infinity (arXiv:2209.05433)."""
    exponent, mantissa = code >> 3 & 15, code & 7
    size = ldexp(8 + mantissa, exponent - 10) if exponent else ldexp(mantissa, -9)
    if code & 127 == 127:
        return nan
    return -size if code & 128 else size


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling specification 1.0, section 5.3.3
VALUES: dict[Numbers, list[float]] = {
    "e2m1": [*_E2M1, *(-size for size in _E2M1)],
    "e4m3": [_e4m3(code) for code in range(256)],
    "int4": [*range(-8, 8)],
    "int8": [*range(128), *range(-128, 0)],
    "offset8": [*range(-128, 128)],
}
"""The number that each code stands for, from code 0 on."""


@dataclass(frozen=True)
class Code:
    """Codes that stand for these `numbers`. Each `tile` of (rows, columns) has a scale; tiles at the borders may be
    smaller.

    int4 and offset8 count from the least number up, and int8 is the two's complement. A byte has two codes of 4 bits,
    the first in its lower half."""

    numbers: Numbers
    tile: tuple[int, int]

    @property
    def bits(self) -> int:
        return 4 if self.numbers in ("e2m1", "int4") else 8

    def tiles(self, rows: int, columns: int) -> tuple[int, int]:
        """How many tiles a matrix has, along its rows and its columns."""
        return ceil(rows / self.tile[0]), ceil(columns / self.tile[1])


@dataclass(frozen=True)
class KeptWeight:
    """A weight that can stay as its files have it: its `code`, the type of its scales, as safetensors names it, and the
    type that the values have. `transposed` says that the files hold each matrix's transpose. `seconds` says what the
    scales of a matrix share, as in NVFP4. With `zeros` each tile also has the code that means zero."""

    code: Code
    scales: str
    dtype: str
    transposed: bool = False
    seconds: Seconds = "none"
    zeros: bool = False

    def sizes(self, rows: int, columns: int) -> dict[str, int]:
        """Bytes of each parameter of one matrix of the model. `seconds` are repeated for each row, so that rows of
        several stored matrices can be joined. `zeros` has a byte for each tile."""
        stored = (columns, rows) if self.transposed else (rows, columns)
        tiles = prod(self.code.tiles(*stored))
        found = {"weight": rows * columns * self.code.bits // 8, "scales": tiles * DTYPE_BYTES[self.scales]}
        if self.seconds != "none":
            found["seconds"] = 4 * stored[0]
        return found | ({"zeros": tiles} if self.zeros else {})


@dataclass(frozen=True)
class KeptSources:
    """Such a weight where it is stored: the parameters of `KeptWeight.sizes`, matrix by matrix."""

    kept: KeptWeight
    sources: PackedSources


@runtime_checkable
class CodedTensor(StoredTensor, Protocol):
    """A tensor whose values are made of codes as they are read."""

    @property
    def kept(self) -> KeptSources | None:
        """How it can stay as it is, instead; None where it cannot."""
        ...
