"""How a frozen weight is held in memory, how it is encoded in files for other programs, and how a format is found by
its name.

A format is one file in trainer/model/held/formats/. Its `HELD` maps each name that `quant.type` may have to a
`HeldFormat`, and its `ENCODERS` the name of each form in which a merged model can be exported to what encodes it (often
the same object). The configuration asks these tables (`Quant.held`), and so does the plan: importing the file loads no
torch, no store and nothing of trainer.config. Functions that handle tensors import torch when they are called.

All storage is uint8: DeepSpeed value-casts floating parameters to the engine's dtype, which would destroy packed
nibbles, and it gathers parameters of one dtype in one collective, so a layer costs one all-gather.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

    from trainer.model.held.codes import KeptWeight
    from trainer.model.held.layers import HeldWeights

_FORMATS = "trainer.model.held.formats"


class HeldFormat(ABC):
    """How the matrices of frozen weights lie in memory. A class states only what differs from most formats."""

    packs: ClassVar[bool] = True
    """Whether weights lie in fewer bits than they are computed with."""
    quantizes: ClassVar[bool] = True
    """Whether `encode` makes the weights from the values in the base's files while these are read."""
    decoding_bytes: ClassVar[int] = 0
    """The bytes that `matrices` takes for a moment beside its result. `by_kernel` takes none, and as many at most if it
    moves codes."""
    moving_traffic: ClassVar[float] = 0.0
    """The bytes a weight that moving its code by a kernel moves through a GPU's memory beside those of decoding."""
    means: bool = False
    """Whether an fp32 mean belongs to each matrix beside its parameters: `absmax_mean` of the module."""
    settings: tuple[str, ...] = ()
    """The settings of `quant` that it reads, beside `type`."""
    in_linear4bit: bool = False
    """Whether bitsandbytes' Linear4bit holds a weight in this way. transformers then uses it in the proof of an
    export."""

    @property
    @abstractmethod
    def in_words(self) -> str:
        """Words about the base for a sentence: `trained over the base ...`."""

    def with_settings(self, block_size: int, double: bool) -> HeldFormat:
        """Return this format with these settings of `quant`."""
        return self

    def unread(self, setting: str) -> str | None:
        """Return what to do if this setting of `quant` is on but the format does not read it. None if it reads it."""
        return None if setting in self.settings else "Remove it, or set quant.type: nf4."

    def of(self, kept: KeptWeight | None) -> HeldFormat:
        """Return how a matrix is held. `kept` says how the files code it; None means that they hold values."""
        return self

    @abstractmethod
    def sizes(self, rows: int, columns: int) -> dict[str, int]:
        """Bytes of each parameter that a matrix becomes, by its name. The first one is `weight`."""

    @abstractmethod
    def matrices(self, held: HeldWeights, first: int, last: int) -> Tensor:
        """Matrices [first, last) of a module, (last - first, *held.slice_shape) in `held.dtype`. Its parameters must
        be gathered.
        """

    def by_kernel(self, held: HeldWeights, first: int, last: int, by: Moves | None) -> Tensor | None:
        """As `matrices`, or with `by` as `moved`, by a kernel for GPUs, with the same bits. None if the format has no
        kernel for this shape.
        """
        return None

    @property
    def moves(self) -> bool:
        """Whether its codes can be moved: `moved`."""
        return False

    def moved(self, held: HeldWeights, first: int, last: int, by: Moves) -> Tensor:
        """As `matrices`, from the codes that a merge as stored writes for the weights plus what is added to them."""
        raise NotImplementedError

    def unit(self, rows: int, columns: int) -> int:
        """The number of weights in a unit. Any run of whole units of a flat matrix can be encoded by itself."""
        raise NotImplementedError

    def unit_bytes(self, rows: int, columns: int) -> dict[str, int]:
        """The bytes of a unit in each parameter, without the parameters that `spanning` makes."""
        raise NotImplementedError

    def encode(self, weights: Tensor, columns: int) -> dict[str, Tensor]:
        """Encode a flat run of whole units of a matrix to the bytes of each parameter. The last unit may be short."""
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Tensor], numel: int, columns: int, dtype: dtype) -> Tensor:
        """(numel,) in `dtype`: the inverse of `encode`."""
        raise NotImplementedError

    @property
    def spanning(self) -> Spanning | None:
        """How the scales of a whole matrix are quantized together; None if they are not."""
        return None

    def product(self, x: Tensor, linear: nn.Linear, bias: Tensor | None) -> Tensor | None:
        """Multiply x (..., in_features) by a layer's weight, and add its bias -> (..., out_features), if the format has
        its own way. None if it is the product with `weight`.
        """
        return None

    def product_back(self, grad: Tensor, linear: nn.Linear, total: Tensor | None) -> Tensor | None:
        """Likewise multiply the gradient (..., out_features) by the same weight -> the inputs' gradient (...,
        in_features). If `total` is given, the result is added to it in place.
        """
        return None

    def weight(self, linear: Any) -> Tensor:
        """The weight of a linear layer, (out_features, in_features)."""
        return linear.dequantize()


class Moves(Protocol):
    """A change that is added to a weight by moving its codes (trainer/model/held/dither.py)."""

    @property
    def name(self) -> str:
        """The weight's name in the model."""
        ...

    def change(self, first: int, rows: int, columns: slice = ...) -> Tensor:
        """Return rows of what is added, or their `columns`, fp32 (rows, columns). Rows are counted over all matrices of
        a stack.
        """
        ...


class Spanning(Protocol):
    """Scales that are quantized themselves, over a whole matrix. So the ranks gather them."""

    part: str
    """The parameter in which `encode` returns them, as fp32."""

    def finish(self, scales: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """All fp32 scales of a matrix -> the bytes of the parameters that they become, and their mean ()."""
        ...

    def left(self, scales: Tensor) -> Tensor:
        """The fp32 scales that remain after quantizing them."""
        ...


class Encodes(Protocol):
    """A form in which a merged model can be exported."""

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings of `quant` that are options of the export too."""
        ...

    def with_settings(self, block_size: int, double: bool) -> Any: ...

    def encoder(self, dtype: dtype) -> Encoder:
        """Its encoder, for a model that computes in `dtype`."""
        ...


def encoders() -> dict[str, Encodes]:
    """Every form in which a merged model can be exported, by its name in `--format`."""
    from trainer.config.registry import kinds  # not above: the configuration asks the formats while it is imported

    return kinds(_FORMATS, "ENCODERS")


class NewTensor(NamedTuple):
    """A tensor of a file to be written; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        from trainer.store.safetensors_index import DTYPE_BYTES

        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass
class WeightError:
    """Sums over the quantized weights: of the squares of the differences, and of the weights."""

    differences: float = 0.0
    weights: float = 0.0

    def add(self, weights: Tensor, decoded: Tensor) -> None:
        import torch

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
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
