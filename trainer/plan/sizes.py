"""Bytes of a base as it is stored, and what is small enough beside it to be whole on every rank. No torch."""

from math import prod
from typing import NamedTuple

from trainer.base.architecture import Architecture, Parameter
from trainer.config import Config, Quant
from trainer.model.held.formats.plain import Plain
from trainer.model.held.held import HeldFormat
from trainer.model.rows.heads import copies_of_keys
from trainer.state.zero.policy import WHOLE
from trainer.tuning.method import method_of

# Adapters of more bytes are not worth their memory on every rank.
_WHOLE_BYTES = 2**29


def value_bytes(config: Config) -> int:
    """Bytes of a value of `model.dtype`."""
    return 2 if config.model.dtype == "bf16" else 4


def held_as(parameter: Parameter, quant: Quant) -> HeldFormat:
    """How a frozen parameter is held: what is no matrix of a linear layer or of experts stays as it is."""
    return quant.held.of(parameter.kept) if parameter.matrices else Plain()


def is_packed(parameter: Parameter, quant: Quant) -> bool:
    """Whether a parameter is held in fewer bits than it is computed with."""
    return held_as(parameter, quant).packs


def multiplies_in_fp8(config: Config, parameter: Parameter) -> bool:
    """Whether the products with a frozen matrix are in FP8 (trainer/model/kernels/fp8.py)."""
    fits = parameter.kind == "linear" and all(size % 16 == 0 for size in parameter.shape)
    return config.train.products == "fp8" and fits and is_packed(parameter, config.quant)


def stored_bytes(parameter: Parameter, quant: Quant, item: int) -> int:
    """Bytes of the matrices of one parameter, which are alike; of `item` bytes a weight where they are not
    quantized.
    """
    means = 4 * len(parameter.matrices) * held_as(parameter, quant).means
    stored = stored_parameters(parameter, quant, item) if parameter.matrices else []
    return means + sum(part.bytes for part in stored)


class StoredParameter(NamedTuple):
    """A parameter of the frozen base as ZeRO-3 divides it: a quantized matrix is several, its codes and its scales, of
    bytes each.
    """

    elements: int
    item: int

    @property
    def bytes(self) -> int:
        return self.elements * self.item


def stored_parameters(parameter: Parameter, quant: Quant, item: int) -> list[StoredParameter]:
    """The parameters that one of the base's becomes; of `item` bytes an element where it is not quantized."""
    form = held_as(parameter, quant)
    if not form.packs:
        return [StoredParameter(parameter.numel, item)]
    rows, columns = parameter.shape[-2:]
    return [StoredParameter(len(parameter.matrices) * size, 1) for size in form.sizes(rows, columns).values()]


def stored_layers(config: Config, model: Architecture) -> list[int]:
    """Bytes of the linear weights and experts of each decoder layer."""
    item = value_bytes(config)
    return [
        sum(stored_bytes(parameter, config.quant, item) for parameter in model.in_layer(layer))
        for layer in range(model.layers)
    ]


def exchanged_values(model: Architecture, size: int) -> int:
    """The values a token that `size` ranks which share a row exchange in a pass through all layers: queries, keys,
    values and results of attention, keys and values as often as ranks need them (trainer/model/rows/attention.py), and
    likewise what other layers take and return. Keys of an unknown form count as queries do. A layer that each rank
    computes whole takes all states of the row."""
    found = 0
    for layer in model.attention if size > 1 else ():
        if layer.path in model.computed_whole:
            continue
        linears = (part for part in model.in_layer(layer.layer) if part.name.startswith(f"{layer.path}."))
        results = [part.shape[1] for part in linears if part.kind == "linear" and part.shape[0] == model.width]
        result = results[-1] if results else model.width
        keys = result
        if layer.key_value_heads and layer.head_size and layer.query_heads:
            keys = _copies(layer.query_heads, layer.key_value_heads, size) * layer.key_value_heads * layer.head_size
        found += 2 * result + 2 * keys
    for mixing in model.mixing if size > 1 else ():
        found += sum(one.values + one.grouped * _copies(one.heads, one.groups, size) for one in mixing.exchanges)
        found += 0 if mixing.exchanges else size * model.width
    return found


def _copies(heads: int, groups: int, size: int) -> int:
    """How often ranks need each group; once, where they could not share the heads."""
    return copies_of_keys(heads, groups, size) if heads % size == 0 else 1


def most_whole(config: Config, model: Architecture) -> int:
    """The elements up to which parameters stay whole on every rank, where the policy does not say: all adapters, as
    long as they are few bytes beside a decoder layer. Then a pass gathers nothing but the base, and each layer in one
    collective."""
    if method_of(config).trains_base:
        return WHOLE
    learning = [prod(shape) for shape in method_of(config).shapes(model).values()]
    few = min(_WHOLE_BYTES, max(stored_layers(config, model)))
    return max([WHOLE, *learning]) if value_bytes(config) * sum(learning) <= few else WHOLE
