"""A parameter that transformers' operations make of stored values, as a tensor that is read in parts."""

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from trainer.base.filling import as_tensor
from trainer.base.reading import PIECE_BYTES, PIECES_IN_FLIGHT
from trainer.safetensors_index import DTYPE_BYTES, StoredTensor


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
        """One slice along the first axis, as a tensor of as many axes."""
        return cls(tensor, index * math.prod(tensor.shape[1:]), (1, *tensor.shape[1:]))

    def values(self) -> Tensor:
        return as_tensor(self.tensor.read(self.begin, self.begin + math.prod(self.shape)), self.tensor).view(self.shape)


class SliceCache:
    """The slices that were made last, of all parameters together: readers are a few pieces ahead of each other.

    As many are kept as the pieces in flight may lie in, but two at least, and no more than that.
    """

    _BYTES = 2 * PIECES_IN_FLIGHT * PIECE_BYTES

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[int, Future[Tensor]]] = {}
        self._lock = Lock()

    def get(self, key: tuple[int, int], size: int, make: Callable[[], Tensor]) -> Tensor:
        """The slice `key` of `size` bytes, which is made by the thread that asks for it first."""
        with self._lock:
            first = key not in self._kept
            _, future = self._kept.setdefault(key, (size, Future()))
            while len(self._kept) > 2 and sum(size for size, _ in self._kept.values()) > self._BYTES:
                del self._kept[next(iter(self._kept))]
        if first:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
        return future.result()


@dataclass(frozen=True)
class Converted:
    """A parameter in equal `slices` along its first axis, each of which `make` makes of values that it reads whole."""

    shape: tuple[int, ...]
    dtype: str
    slices: int
    make: Callable[[int], Tensor] = field(repr=False)
    cache: SliceCache = field(repr=False)

    def read(self, begin: int, end: int) -> bytearray:
        data, size = bytearray(), math.prod(self.shape) // self.slices
        for index in range(begin // size, -(-end // size)):
            values = self.cache.get((id(self), index), size * DTYPE_BYTES[self.dtype], lambda at=index: self._flat(at))
            part = values[max(begin - index * size, 0) : end - index * size]
            data += part.view(torch.uint8).numpy().tobytes()
        return data

    def _flat(self, index: int) -> Tensor:
        return self.make(index).contiguous().flatten()
