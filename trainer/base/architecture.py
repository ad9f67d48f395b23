"""The architecture of a decoder-only model: its parameters and sizes, known without loading torch.

`trainer/base/families.py` makes an `Architecture` of a config.json. Code that plans, loads, tunes or picks a kernel
asks here, and no other file knows what a model is called.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from trainer.config import Config

Kind = Literal["linear", "experts", "embedding", "head", "small"]


@dataclass(frozen=True)
class Parameter:
    """One parameter, by its name and shape in the model that transformers builds.

    `kind`: the matrix (outputs, inputs) of a linear layer that can be quantized and adapted; a stack (experts, rows,
    columns) of a mixture's matrices, quantized one by one; embedding and head; `small` is all the rest: norms, biases,
    routers. `layer` is None outside the decoder layers.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrices(self) -> list[int]:
        """Weights of each matrix in it that is quantized by itself; none where it is not quantized."""
        if self.kind == "linear":
            return [self.numel]
        return [math.prod(self.shape[1:])] * self.shape[0] if self.kind == "experts" else []


@dataclass(frozen=True)
class Linear:
    """One linear layer: its weight is (outputs, inputs)."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model, cut to its first `layers` of `stored_layers` in the files.

    `intermediate` is the width of an MLP for one token, all active experts together. `tied`: head and embedding are one
    matrix. `positions` is the longest sequence, where the model has a limit. The attention caps its logits
    (`caps_attention`, Gemma 2), or has a sink for each head (`has_sinks`), which not every kernel computes. `isolates_documents`:
    transformers' mask of it honours the borders of packed documents. `stored_as` maps a parameter to the tensors of the
    files that make it up, in order, where these are not one tensor of its own name. With `softcap` c the head's logits z are
    c * tanh(z / c). `head_size` is the width of one attention head. `sliding_window` is the number of tokens that layers see back,
    themselves included, where some do not see all.
    """

    layers: int
    stored_layers: int
    hidden: int
    intermediate: int
    query_size: int
    key_value_size: int
    head_size: int
    vocabulary: int
    tied: bool
    positions: int | None
    parameters: tuple[Parameter, ...]
    stored_as: dict[str, tuple[str, ...]]
    caps_attention: bool = False
    has_sinks: bool = False
    isolates_documents: bool = True
    softcap: float | None = None
    sliding_window: int | None = None

    @property
    def key_value_heads(self) -> int:
        return self.key_value_size // self.head_size

    def weights(self, *kinds: Kind) -> int:
        """Elements of all parameters of these kinds."""
        return sum(parameter.numel for parameter in self.parameters if parameter.kind in kinds)

    def matrices(self, layer: int) -> list[int]:
        """Weights of each matrix of one decoder layer that is quantized by itself."""
        return self._matrices.get(layer, [])

    @cached_property
    def _matrices(self) -> dict[int | None, list[int]]:
        found: dict[int | None, list[int]] = {}
        for parameter in self.parameters:
            found.setdefault(parameter.layer, []).extend(parameter.matrices)
        return found

    def quantizable(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight that can be quantized."""
        return {
            parameter.name: parameter.shape for parameter in self.parameters if parameter.kind in ("linear", "experts")
        }

    @property
    def linear_names(self) -> list[str]:
        """The last names of all linear layers, as tools that adapt them are told, sorted."""
        return sorted({path.rpartition(".")[2] for path in self.linear_layers()})

    def linear_layers(self) -> dict[str, Linear]:
        """Path in the model -> every linear layer that can be adapted, in the model's order."""
        return {
            parameter.name.removesuffix(".weight"): Linear(inputs=parameter.shape[1], outputs=parameter.shape[0])
            for parameter in self.parameters
            if parameter.kind == "linear"
        }

    def blocks(self) -> dict[int, list[str]]:
        """Decoder layer -> the paths in the model of its blocks, each of whose outputs is added to the hidden states: first
        attention, last the MLP or the mixture of experts."""
        found: dict[int, dict[str, None]] = {}
        for parameter in self.parameters:
            if parameter.layer is not None and parameter.kind in ("linear", "experts"):
                before, number, rest = parameter.name.partition(f".{parameter.layer}.")
                found.setdefault(parameter.layer, {})[before + number + rest.partition(".")[0]] = None
        return {layer: list(paths) for layer, paths in found.items()}

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The tensors of the files that make up the parameter `name`, in order."""
        return self.stored_as.get(name, (name,))


def mismatches(config: Config, model: Architecture) -> list[str]:
    """A sentence for each setting of `config` that asks more of the architecture than it has."""
    length, found = config.data.sequence_length, list[str]()
    if model.positions and length > model.positions:
        found.append(
            f"data.sequence_length: {length} exceeds the base's {model.positions} positions (config.json). Lower it."
        )
    if config.model.layers and config.model.layers > model.stored_layers:
        found.append(
            f"model.layers: {config.model.layers} exceeds the base's {model.stored_layers} layers (config.json). Lower it."
        )
    if config.data.packing and not model.isolates_documents:
        found.append(
            "data.packing: documents of one row would see each other, as transformers' mask for this base does not know "
            "their borders. Set data.packing: false."
        )
    return found
