"""How a format is written for other programs to read: matrix by matrix, some rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.store.safetensors_index import DTYPE_BYTES


class NewTensor(NamedTuple):
    """A tensor of a file to be written; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass
class WeightError:
    """Sums over the quantized weights: of the squares of the differences, and of the weights."""

    differences: float = 0.0
    weights: float = 0.0

    def add(self, weights: Tensor, decoded: Tensor) -> None:
        self.differences += float((decoded.float() - weights.float()).square().sum(dtype=torch.float64))
        self.weights += float(weights.float().square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        return (self.differences / self.weights) ** 0.5 if self.weights else 0.0


class Encoder(Protocol):
    """A way to store a matrix in fewer bits, as other programs read it."""

    @property
    def name(self) -> str:
        """In words, such as nf4."""
        ...

    def takes(self, shape: tuple[int, int]) -> bool:
        """Whether a matrix of this shape can be stored so."""
        ...

    def at_once(self, shape: tuple[int, int]) -> int:
        """A matrix may be encoded in portions of any multiple of so many elements."""
        ...

    def entries(self, name: str, shape: tuple[int, int]) -> list[NewTensor]:
        """The tensors in place of the weight `name`, in the order in which `encode` gives their bytes."""
        ...

    def encode(self, pieces: Iterator[Tensor], shape: tuple[int, int], error: WeightError) -> Iterator[bytes]:
        """`pieces` are the flat weights, in order; each but the last a multiple of `at_once` long."""
        ...

    def configuration(self, untouched: list[str]) -> dict[str, Any]:
        """The quantization_config of config.json; `untouched` are the paths of linear layers that stay as they are."""
        ...


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
