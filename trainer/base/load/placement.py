"""Replaces the parameters of a model on `meta` by partitions, and its matrices by 4-bit modules.

These are the room for a rank's share of the base. A source then fills them (source.py).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.base.partitions.exchanged import exchanged
from trainer.base.partitions.filling import Copy, Quantize, copy_packed, make_packed
from trainer.base.partitions.reading import Job
from trainer.base.rows.packed_parts import kept_sources
from trainer.config import Quant
from trainer.model.held.layers import HeldWeights, hold
from trainer.state.zero.partition import Partition, Partitioner
from trainer.store.safetensors_index import PackedSources, PackedTensor, StoredTensor

PackedOf = Callable[[str], PackedSources | None]
"""The packed weights of the module at a path, or None where there are none to be read."""


def nothing_packed(_path: str) -> None:
    """The source of packed weights for a load without any: they are made from the files' weights."""


@dataclass
class Placement:
    """The packed modules, by their names before adapters wrap them, and what makes the jobs that fill the partitions.

    The jobs use packed weights if these can be read.
    """

    packed: dict[str, tuple[HeldWeights, dict[str, Partition]]] = field(default_factory=dict)
    fillings: list[Callable[[PackedOf], Sequence[Job]]] = field(default_factory=list)

    def jobs(self, stored: PackedOf = nothing_packed) -> list[Job]:
        """The jobs that fill all partitions. Raises `Damaged` if packed weights have other sizes."""
        return [job for filling in self.fillings for job in filling(stored)]

    def partitions(self) -> dict[str, Partition]:
        """The partitions of all packed parameters, by name."""
        return {
            f"{path}.{name}": partition for path, (_, made) in self.packed.items() for name, partition in made.items()
        }

    def means(self) -> dict[str, list[float]]:
        """The means of absmax by module, under double quantization."""
        return {path: module.absmax_mean.tolist() for path, (module, _) in self.packed.items() if module.form.means}


def place_partitions(
    model: PreTrainedModel,
    quant: Quant,
    dtype: torch.dtype,
    partitioner: Partitioner,
    sources: Mapping[str, StoredTensor | PackedTensor],
    quantizable: Collection[str],
) -> Placement:
    """Replace every parameter and every stored buffer of `model`. Each keeps the type that it has on `meta`.

    Args:
        dtype: the type of products with quantized weights.
        sources: where each parameter and buffer is read from.
        quantizable: the names of the weights that `quant` quantizes.
    """
    placement, parameters, held = Placement(), dict(model.named_parameters()), quant.held
    for name in [name for name in sources if name not in parameters]:
        buffer = _place_buffer(model, name, sources[name], partitioner.device)
        placement.fillings.append(lambda _, buffer=buffer: [buffer])
    for name, parameter in parameters.items():
        path, source = name.removesuffix(".weight"), sources[name]
        as_it_is = kept_sources(source) if name in quantizable and not held.quantizes else None
        form = held.of(as_it_is and as_it_is.kept)
        if name not in quantizable or not form.packs:
            assert not isinstance(source, PackedTensor)
            partition = partitioner.make(parameter.shape, parameter.dtype)
            _replace(model, parameter, partition.parameter)
            copied = exchanged(Copy(source, partition), source, partitioner)
            placement.fillings.append(lambda _, copied=copied: [copied])
            continue
        packed = hold(model, name, parameter, form, dtype)
        made = make_packed(packed, partitioner)
        placement.packed[path] = packed, made
        own = source.sources if isinstance(source, PackedTensor) else None
        given = own if as_it_is is None else as_it_is.sources
        placement.fillings.append(partial(_fill_packed, path, packed, made, given, source, partitioner))
    return placement


def _fill_packed(
    path: str,
    module: HeldWeights,
    made: dict[str, Partition],
    given: PackedSources | None,
    source: StoredTensor | PackedTensor,
    partitioner: Partitioner,
    stored: PackedOf,
) -> Sequence[Job]:
    """The jobs that fill the partitions `made` for the `module` at `path`.

    They use the packed weights that the base has (`given`) or that are `stored` elsewhere, or else the weight in
    `source`.
    """
    found = stored(path) if given is None else given
    if found is not None:
        return copy_packed(module, made, found)
    assert not isinstance(source, PackedTensor)
    return [exchanged(Quantize(source, module, made, partitioner), source, partitioner)]


def _place_buffer(model: nn.Module, name: str, source: StoredTensor | PackedTensor, device: torch.device) -> Copy:
    """The job that fills a buffer. Buffers are small, so every rank holds the whole one."""
    assert not isinstance(source, PackedTensor)
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    values = torch.empty_like(owner.get_buffer(leaf), device=device)
    owner.register_buffer(leaf, values)
    return Copy(source, Partition(nn.Parameter(values, requires_grad=False), 0, values.numel(), values.view(-1)))


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Replace a parameter in every module that shares it, so that a tied weight stays tied."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter is old:
                setattr(module, name, new)
