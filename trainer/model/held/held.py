"""The seam of how a frozen weight is held in memory, and how a format is found by its name.

A format is one file in trainer/model/held/formats/. Its `HELD` maps each name that `quant.type` may have to a
`HeldFormat`, and its `ENCODERS` the name of each form in which a merged model can be exported to what encodes it (often
the same object). The configuration asks these tables (`Quant.held`), and so does the plan: importing the file loads no
torch, no store and nothing of trainer.config. What handles tensors imports torch when it is called.

All storage is uint8: DeepSpeed value-casts floating parameters to the engine's dtype, which would destroy packed
nibbles, and it gathers parameters of one dtype in one collective, so a layer costs one all-gather.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

    from trainer.model.held.codes import Kept
    from trainer.model.held.encoder import Encoder
    from trainer.model.held.layers import HeldWeights

_FORMATS = "trainer.model.held.formats"


class HeldFormat(ABC):
    """How the matrices of frozen weights lie in memory, a value. What is not said of a format is so of most."""

    packs: ClassVar[bool] = True
    """Whether weights lie in fewer bits than they are computed with."""
    quantizes: ClassVar[bool] = True
    """Whether they are made of the values that the base's files have, as these are read: by `encode`."""
    decoding_bytes: ClassVar[int] = 0
    """The memory that `matrices` takes for a moment beside its result. `by_kernel` takes none."""
    moving_traffic: ClassVar[float] = 0.0
    """The bytes a weight that `moved` moves through a GPU's memory beside those of decoding."""
    means: bool = False
    """Whether an fp32 mean belongs to each matrix beside its parameters: `absmax_mean` of the module."""
    settings: tuple[str, ...] = ()
    """The settings of `quant` that it reads, beside `type`."""
    in_linear4bit: bool = False
    """Whether bitsandbytes' Linear4bit holds a weight so, by which transformers proves an export."""

    @property
    @abstractmethod
    def in_words(self) -> str:
        """The base in a sentence: `trained over the base ...`."""

    def with_settings(self, block_size: int, double: bool) -> HeldFormat:
        """The same by the settings of `quant`."""
        return self

    def unread(self, setting: str) -> str | None:
        """What to do where this setting of `quant` is switched on, which the format does not read; None if it does."""
        return None if setting in self.settings else "Remove it, or set quant.type: nf4."

    def of(self, kept: Kept | None) -> HeldFormat:
        """How a matrix is held that files hold in their own codes, as `kept` says, or in values."""
        return self

    @abstractmethod
    def sizes(self, rows: int, columns: int) -> dict[str, int]:
        """Bytes of each parameter that a matrix becomes, by its name. The first one is `weight`."""

    @abstractmethod
    def matrices(self, held: HeldWeights, first: int, last: int) -> Tensor:
        """Matrices [first, last) of a module, (last - first, *held.slice_shape) in `held.dtype`. Its parameters must
        be gathered.
        """

    def by_kernel(self, held: HeldWeights, first: int, last: int) -> Tensor | None:
        """The same bits by one launch of a kernel for GPUs, however many matrices there are. None where the format, or
        this shape in it, has none.
        """
        return None

    @property
    def moves(self) -> bool:
        """Whether its codes can be moved: `moved`."""
        return False

    def moved(self, held: HeldWeights, first: int, last: int, by: Moves) -> Tensor:
        """As `matrices`, of the codes that a merge as stored writes for the weights and what is added to them."""
        raise NotImplementedError

    def unit(self, rows: int, columns: int) -> int:
        """The weights of a flat matrix that are encoded by themselves: any run of whole units is."""
        raise NotImplementedError

    def unit_bytes(self, rows: int, columns: int) -> dict[str, int]:
        """The bytes of such a unit in each parameter; those that `spanning` makes are left out."""
        raise NotImplementedError

    def encode(self, weights: Tensor, columns: int) -> dict[str, Tensor]:
        """A flat run of whole units of a matrix, of which the last may be short -> the bytes of each parameter."""
        raise NotImplementedError

    def decode(self, parts: Mapping[str, Tensor], numel: int, columns: int, dtype: dtype) -> Tensor:
        """(numel,) in `dtype`: the inverse of `encode`."""
        raise NotImplementedError

    @property
    def spanning(self) -> Spanning | None:
        """What the scales of a whole matrix still become together, if anything."""
        return None

    def product(self, x: Tensor, linear: nn.Linear, bias: Tensor | None) -> Tensor | None:
        """x (..., in_features) by a layer's weight, and its bias -> (..., out_features), where the format has a way of
        its own; None where it is the product with `weight`.
        """
        return None

    def product_back(self, grad: Tensor, linear: nn.Linear, total: Tensor | None) -> Tensor | None:
        """Likewise the gradient (..., out_features) by the same weight -> that of the inputs (..., in_features), in
        `total` where that is given, to which it is added.
        """
        return None

    def weight(self, linear: Any) -> Tensor:
        """The weight of a linear layer, (out_features, in_features)."""
        return linear.dequantize()


class Moves(Protocol):
    """What is added to a weight by moving its codes (trainer/model/held/dither.py)."""

    @property
    def name(self) -> str:
        """The weight's name in the model."""
        ...

    def change(self, first: int, rows: int, columns: slice = ...) -> Tensor:
        """Rows of what is added, or their `columns`, fp32 (rows, columns). Those of a stack's matrices are counted
        over the whole stack.
        """
        ...


class Spanning(Protocol):
    """Scales that are quantized themselves, over a whole matrix, which ranks therefore gather."""

    part: str
    """The parameter that `encode` gives them in, as fp32."""

    def finish(self, scales: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """All fp32 scales of a matrix -> the bytes of the parameters that they become, and their mean ()."""
        ...

    def left(self, scales: Tensor) -> Tensor:
        """The fp32 scales that are left of them."""
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
    from trainer.config.registry import kinds  # later, as the configuration asks the formats while it is imported

    return kinds(_FORMATS, "ENCODERS")
