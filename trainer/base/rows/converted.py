"""Parameters that transformers' operations or a transposition make from stored values, readable in parts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.base.partitions.filling import SOURCE_DTYPES, as_tensor
from trainer.base.partitions.reading import PIECE_BYTES, PIECES_IN_FLIGHT
from trainer.base.stored.shared.cached_values import LastMade
from trainer.store.safetensors_index import DTYPE_BYTES, StoredTensor, TensorSource, item_bytes

# Readers run a few pieces ahead of each other, so keep as many slices as the pieces in flight may need.
_KEPT_BYTES = 2 * PIECES_IN_FLIGHT * PIECE_BYTES
_MATRICES_KEPT = 2  # because pieces of two matrices may be in flight


@dataclass(frozen=True)
class StoredPart:
    """A stored tensor from its element `begin` on, as a tensor of `shape`."""

    tensor: StoredTensor
    begin: int
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: StoredTensor) -> "StoredPart":
        return cls(tensor, 0, tensor.shape)

    @classmethod
    def of(cls, tensor: StoredTensor, index: int) -> "StoredPart":
        """One slice along the first axis, with the same number of axes."""
        return cls(tensor, index * math.prod(tensor.shape[1:]), (1, *tensor.shape[1:]))

    def values(self) -> Tensor:
        return as_tensor(self.tensor.read(self.begin, self.begin + math.prod(self.shape)), self.tensor).view(self.shape)


@dataclass(frozen=True)
class Converted:
    """A parameter in equal `slices` along its first axis. `make` makes each from values that it reads whole."""

    shape: tuple[int, ...]
    dtype: str
    slices: int
    make: Callable[[int], Tensor] = field(repr=False)
    last_made: LastMade[Tensor] = field(repr=False)

    def read(self, begin: int, end: int) -> bytearray:
        data, size = bytearray(), math.prod(self.shape) // self.slices
        most = max(2, _KEPT_BYTES // (size * DTYPE_BYTES[self.dtype]))
        for index in range(begin // size, -(-end // size)):
            values = self.last_made.get((id(self), index), most, lambda at=index: self._flat(at))
            part = values[max(begin - index * size, 0) : end - index * size]
            data += part.view(torch.uint8).numpy().tobytes()
        return data

    def _flat(self, index: int) -> Tensor:
        # An operation may convert its result to the parameter's type. Undo that, because the loader sets the type.
        return self.make(index).to(SOURCE_DTYPES[self.dtype]).contiguous().flatten()


@dataclass(frozen=True)
class Transposed:
    """A matrix whose `transpose` is stored.

    Reading its own rows needs the whole stored tensor, which is read only once if `last_made` keeps it.
    """

    transpose: TensorSource
    last_made: LastMade[Tensor] = field(repr=False, compare=False)
    together = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.transpose.shape[::-1]

    @property
    def dtype(self) -> str:
        return self.transpose.dtype

    def read(self, begin: int, end: int) -> bytearray:
        size, stored = item_bytes(self.transpose), self.transpose
        data = self.last_made.get((stored.key, stored.offset), _MATRICES_KEPT, self._bytes)
        return bytearray(data.numpy().data[size * begin : size * end])

    def _bytes(self) -> Tensor:
        return StoredPart.whole(self.transpose).values().t().contiguous().flatten().view(torch.uint8)
