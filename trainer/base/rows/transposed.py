"""A matrix whose files have its transpose."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.base.partitions.filling import as_tensor
from trainer.base.stored.shared.cached_values import LastMade
from trainer.store.safetensors_index import TensorSource, item_bytes, numel

_KEPT = 2  # matrices, as pieces of two may be in flight


@dataclass(frozen=True)
class Transposed:
    """The transpose of the tensor `stored`. Read by rows of its own it takes all of that, once where `last_made` keeps it."""

    stored: TensorSource
    last_made: LastMade[Tensor] = field(repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1]

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    def read(self, begin: int, end: int) -> bytearray:
        size = item_bytes(self.stored)
        values = self.last_made.get((self.stored.key, self.stored.offset), _KEPT, self._whole)
        return bytearray(values.numpy().data[size * begin : size * end])

    def _whole(self) -> Tensor:
        """Its bytes."""
        values = as_tensor(self.stored.read(0, numel(self.stored)), self.stored).view(self.stored.shape)
        return values.t().contiguous().flatten().view(torch.uint8)
