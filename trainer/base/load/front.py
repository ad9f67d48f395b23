"""Loads the tower of a base: whole on each rank, frozen, in the type of the run.

It is transformers' whole class, whose decoder, head and embedding stay on `meta`: those that train are elsewhere.
"""

from collections.abc import Collection, Mapping
from math import prod

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from trainer.base.base import Base
from trainer.base.describe.empty_model import unfilled_whole
from trainer.base.describe.language_model import beside_decoder, first_layers, inner_of
from trainer.base.partitions.filling import as_tensor
from trainer.base.rows.conversion import convert
from trainer.base.rows.packed_parts import Weight
from trainer.base.unreadable import read_by_transformers
from trainer.errors import ConfigError
from trainer.model.front import Front
from trainer.model.parts import tied_names
from trainer.store.safetensors_index import PackedTensor, numel


def load_front(
    base: Base,
    layers: int | None,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    needed: Collection[str] | None = None,
) -> tuple[Front, int]:
    """The part of `base` in front of its decoder on `device`, and the bytes of its weights.

    `attention` is the name of the decoder's kernel, for which the class makes masks. Over kept features the `needed`
    weights alone are loaded.

    Raises:
        ConfigError: the base takes no pictures, or its files lack a weight of this part.
        StorageError: a weight cannot be read.
    """
    whole = _whole(base, layers, dtype, attention)
    size = 0
    for name, (tensor, source) in _sources(base, whole).items():
        if needed is not None and name not in needed:
            continue
        _set(whole, name, _read(base, name, tensor, source).to(device))
        size += prod(tensor.shape) * tensor.element_size()
    for module in whole.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
    reads_prompts = base.architecture.reads_prompts
    return Front(whole, inner_of(whole), whole.get_input_embeddings(), reads_prompts=reads_prompts), size


def weights_beside(base: Base) -> dict[str, Weight]:
    """The weights of the tower of `base`, by their names in the whole class. Raises as `load_front`."""
    return {name: source for name, (_, source) in _sources(base, _whole(base, None, torch.float32, "eager")).items()}


def values_beside(base: Base, layers: int | None, names: Collection[str]) -> dict[str, Tensor]:
    """The values of some of them, in the type of the files. Raises as `load_front`."""
    sources = _sources(base, _whole(base, layers, torch.float32, "eager"))
    found = dict[str, Tensor]()
    for name in names:
        tensor, source = sources[name]
        assert not isinstance(source, PackedTensor)
        found[name] = as_tensor(source.read(0, numel(source)), source).reshape(tensor.shape)
    return found


def _whole(base: Base, layers: int | None, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    with read_by_transformers(base.name, "config.json"):
        config = AutoConfig.from_pretrained(base.directory, trust_remote_code=False)
        if config.get_text_config() is config:
            raise ConfigError(
                f"model.base: {base.name} is a language model, which takes no pictures. Give one that does."
            )
        return unfilled_whole(first_layers(config, layers)[0], dtype, attention)


def _sources(base: Base, whole: PreTrainedModel) -> dict[str, tuple[Tensor, Weight]]:
    found, tied = convert(whole, base.weights), tied_names(whole)
    result = dict[str, tuple[Tensor, Weight]]()
    for name, tensor in beside_decoder(whole).items():
        source = found.sources.get(name) or found.sources.get(tied.get(name, name))
        if source is None:
            raise ConfigError(
                f"model.base: {base.name} has no tensor {name}, which its tower (encoder and projector) needs. Copy"
                " the model again."
            )
        if isinstance(source, PackedTensor):
            raise ConfigError(
                f"model.base: {name} of {base.name} is in 4 bits, but the run computes with the tower in 16."
                " Give the 16-bit model; quant.type quantizes its language model."
            )
        if source.shape != tuple(tensor.shape):
            raise ConfigError(
                f"model.base: {name} is {list(source.shape)} in {base.name}, {list(tensor.shape)} by config.json. Copy"
                " the model again."
            )
        result[name] = tensor, source
    return result


def _read(base: Base, name: str, tensor: Tensor, source: Weight) -> Tensor:
    assert not isinstance(source, PackedTensor)
    data = source.read(0, numel(source))
    return as_tensor(data, source).reshape(tensor.shape).to(tensor.dtype)


def _set(whole: PreTrainedModel, name: str, values: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = whole.get_submodule(path)
    held: Mapping[str, Tensor | None] = module._parameters
    if leaf in held:
        module._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    else:
        module._buffers[leaf] = values
