"""Bytes of a base as it is stored, and which of its parameters are small enough to be whole on every rank. No torch."""

from math import prod
from typing import NamedTuple

from trainer.base.architecture import Architecture, Parameter
from trainer.config import Config, Quant
from trainer.model.held.formats.plain import Plain
from trainer.model.held.held import HeldFormat
from trainer.model.rows.heads import copies_of_keys
from trainer.state.zero.policy import WHOLE
from trainer.tuning.method import method_of

# Larger adapters are not worth their memory on every rank.
_WHOLE_BYTES = 2**29


def value_bytes(config: Config) -> int:
    """Return the bytes of a value of `model.dtype`."""
    return 2 if config.model.dtype == "bf16" else 4


def held_as(parameter: Parameter, quant: Quant) -> HeldFormat:
    """Return how a frozen parameter is held. Only matrices of linear layers and of experts can change their form."""
    return quant.held.of(parameter.kept) if parameter.matrices else Plain()


def is_packed(parameter: Parameter, quant: Quant) -> bool:
    """Return whether a parameter is held in fewer bits than it is computed with."""
    return held_as(parameter, quant).packs


def multiplies_in_fp8(config: Config, parameter: Parameter) -> bool:
    """Return whether the products with a frozen matrix are in FP8 (trainer/model/kernels/fp8.py)."""
    fits = parameter.kind == "linear" and all(size % 16 == 0 for size in parameter.shape)
    return config.train.products == "fp8" and fits and is_packed(parameter, config.quant)


def stored_bytes(parameter: Parameter, quant: Quant, item: int) -> int:
    """Return the bytes of the matrices of one parameter, which are alike.

    If they are not quantized, a weight takes `item` bytes.
    """
    means = 4 * len(parameter.matrices) * held_as(parameter, quant).means
    stored = stored_parameters(parameter, quant, item) if parameter.matrices else []
    return means + sum(part.bytes for part in stored)


class StoredParameter(NamedTuple):
    """A parameter of the frozen base as ZeRO-3 divides it.

    A quantized matrix is several such parameters, its codes and its scales, which consist of bytes.
    """

    elements: int
    item: int

    @property
    def bytes(self) -> int:
        return self.elements * self.item


def stored_parameters(parameter: Parameter, quant: Quant, item: int) -> list[StoredParameter]:
    """Return the parameters that one of the base's becomes. An element that is not quantized takes `item` bytes."""
    form = held_as(parameter, quant)
    if not form.packs:
        return [StoredParameter(parameter.numel, item)]
    rows, columns = parameter.shape[-2:]
    return [StoredParameter(len(parameter.matrices) * size, 1) for size in form.sizes(rows, columns).values()]


def stored_layers(config: Config, model: Architecture) -> list[int]:
    """Return the bytes of the linear weights and experts of each decoder layer."""
    item = value_bytes(config)
    return [
        sum(stored_bytes(parameter, config.quant, item) for parameter in model.in_layer(layer))
        for layer in range(model.layers)
    ]


def exchanged_values(model: Architecture, size: int) -> int:
    """Return the values a token that `size` ranks which share a row exchange in a pass through all layers.

    They are queries, keys, values and results of attention, and likewise what other layers take and return. Keys and
    values count as often as ranks need them (trainer/model/rows/attention.py). Keys of an unknown form count like
    queries. A layer that each rank computes whole takes all states of the row.
    """
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
    """Return how often ranks need each group. It is once if they could not share the heads."""
    return copies_of_keys(heads, groups, size) if heads % size == 0 else 1


def most_whole(config: Config, model: Architecture) -> int:
    """Return the number of elements up to which parameters stay whole on every rank, if the policy does not say.

    It covers all adapters, as long as they take few bytes beside a decoder layer. Then a pass gathers nothing but the
    base, and each layer in one collective.
    """
    if method_of(config).trains_base:
        return WHOLE
    learning = [prod(shape) for shape in method_of(config).shapes(model).values()]
    few = min(_WHOLE_BYTES, max(stored_layers(config, model)))
    return max([WHOLE, *learning]) if value_bytes(config) * sum(learning) <= few else WHOLE
