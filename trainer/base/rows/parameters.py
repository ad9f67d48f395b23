"""Finds the model's weights in the files from their headers alone, and checks them before any weight is read."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trainer.base.base import Base
from trainer.base.describe.empty_model import TransposedLinear, idle_rows, meta_model
from trainer.base.describe.language_model import composite_model, language_names, model_config
from trainer.base.find.check import LeftOutPart
from trainer.base.find.locate import resolve_base
from trainer.base.partitions.filling import SOURCE_DTYPES
from trainer.base.rows.conversion import Conversion, Transposed, convert
from trainer.base.rows.packed_parts import Weight
from trainer.base.stored.shared.cached_values import LastMade
from trainer.base.unreadable import read_by_transformers
from trainer.config import Model
from trainer.errors import ConfigError
from trainer.model.parts import tied_names
from trainer.store.safetensors_index import WEIGHT_DTYPES, Joined, PackedTensor, TensorSource, numel

# The elements of each compared part of two weights, and the number of parts after the first.
_COMPARED, _PARTS = 2**15, 16
# Old files hold these tensors, but transformers computes them again.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class FoundWeights:
    """The source of each parameter and persistent buffer of a model, by name.

    A tied parameter has its first name. `copies` has what the files hold under its other names. `left_out` are parts of
    the files that the language model does not have, such as the tower, or layers that predict several tokens.
    """

    sources: dict[str, Weight]
    copies: dict[str, list[Weight]]
    left_out: list[LeftOutPart]


def find_all_weights(base: Base, layers: int | None = None) -> FoundWeights:
    """Find the weights of the whole base, or of its first `layers`, in the files. Raises as `find_weights`."""
    with read_by_transformers(base.name, "config.json"):
        model = meta_model(model_config(base.directory, layers))
    return find_weights(base, model, layers)


def find_weights(base: Base, model: PreTrainedModel, layers: int | None = None) -> FoundWeights:
    """Find the weights of `model` in the files of `base`. transformers built the model, which may be on `meta`.

    With `layers` the model is cut to its first layers, and the files' other layers are left out on purpose.

    Raises:
        ConfigError: the files lack a weight, have it in another shape or in an unreadable type, or have a tensor that
            the model lacks.
    """
    found = _convert(base, model)
    for name, reason in found.failed.items():
        raise ConfigError(
            f"model.base: {name} cannot be made of what {base.name} has for it ({reason}). Copy the model again."
        )
    tied, state, last_made = tied_names(model), model.state_dict(), LastMade[Tensor]()
    sources, copies = dict[str, Weight](), dict[str, list[Weight]]()
    for name, tensor in state.items():
        there, original = _as_in_model(model, name, tensor, found.sources.get(name), last_made), tied.get(name, name)
        if there is not None and original in sources:
            copies.setdefault(original, []).append(_checked(base, name, tensor, there))
        elif there is not None:
            sources[original] = _checked(base, name, tensor, there)
    for name in state:
        if tied.get(name, name) not in sources:
            raise ConfigError(
                f"model.base: {base.name} has no tensor {name}, which its architecture needs. Copy the model again."
            )
    for original, others in copies.items():
        for other in others:
            _check_tied(base, original, sources[original], other)
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    left_out = {**found.beside, **_left_out(base, found.others, ignored, layers)}
    return FoundWeights(sources, copies, _parts(left_out, found.sources))


def _as_in_model(
    model: PreTrainedModel, name: str, tensor: Tensor, source: Weight | None, last_made: LastMade[Tensor]
) -> Weight | None:
    """The source of a weight in the model's form: without rows of experts that compute nothing, and transposed back.

    Plain files may hold the transpose of a linear layer's weight. Quantized formats hold it as it is computed with.
    """
    idle = idle_rows(model, name)
    if idle and isinstance(source, Joined) and source.shape[0] == len(tensor) + idle:
        source = _first_rows(source, len(tensor))
    path, _, leaf = name.rpartition(".")
    transposed = leaf == "weight" and isinstance(model.get_submodule(path), TransposedLinear)
    return Transposed(source, last_made) if transposed and isinstance(source, TensorSource) else source


def _first_rows(source: Joined, rows: int) -> Joined:
    """The first `rows` of a stack if the files hold more."""
    shape = rows, *source.shape[1:]
    count = sum(start < prod(shape) for start in source.starts)
    return Joined(source.parts, source.stretches[:count], shape)


def _convert(base: Base, model: PreTrainedModel) -> Conversion:
    """The tensors in the files, by their names in `model`.

    If the base also processes pictures or sound, they are those of its language model.
    """
    with read_by_transformers(base.name, "config.json"):
        whole = composite_model(base.directory)
    if whole is None:
        return convert(model, base.weights)
    found, name_in_language = convert(whole, base.weights), language_names(whole, model)
    for name, first in tied_names(whole).items():
        if first in found.sources:
            found.sources.setdefault(name, found.sources[first])
    return Conversion(
        {here: source for name, source in found.sources.items() if (here := name_in_language(name))},
        {here: reason for name, reason in found.failed.items() if (here := name_in_language(name))},
        {key: name_in_language(name) or name for key, name in found.others.items()},
        {name: source for name, source in found.sources.items() if not name_in_language(name)},
    )


def _left_out(base: Base, others: Mapping[str, str], ignored: Iterable[str], layers: int | None) -> dict[str, Weight]:
    """The tensors that the model lacks on purpose, by the name that each would have there.

    `others` is that of a `Conversion`, and `ignored` has patterns of names that transformers ignores as well.

    Raises:
        ConfigError: a tensor may not be left out. The model is then not the one that config.json describes, and a bias
            or a layer would silently be missing.
    """
    patterns = [re.compile(pattern) for pattern in ignored]
    rest = {key: name for key, name in others.items() if not _COMPUTED.search(name) and not _is_beyond(name, layers)}
    unknown = [key for key, name in rest.items() if not any(pattern.search(name) for pattern in patterns)]
    if unknown:
        raise ConfigError(
            f"model.base: {base.name} has the tensor {unknown[0]}, which the architecture of its config.json"
            f" lacks ({len(unknown)} such tensors). Give the config.json that belongs to these files."
        )
    return {name: base.weights[key] for key, name in rest.items()}


def _is_beyond(name: str, layers: int | None) -> bool:
    """Whether a tensor belongs to a layer behind the cut. The first number in a name is that of the layer."""
    number = re.search(r"\.(\d+)\.", name)
    return layers is not None and number is not None and int(number[1]) >= layers


def _parts(left_out: Mapping[str, Weight], kept: Iterable[str]) -> list[LeftOutPart]:
    """The parts that are left out, each named by the shortest path that contains no kept tensor."""
    inside, sizes = {path for name in kept for path in _paths(name)}, dict[str, list[int]]()
    for name, weight in left_out.items():
        path = next((path for path in _paths(name) if path not in inside), name)
        sizes.setdefault(path, []).append(prod(weight.shape))
    return [LeftOutPart(path, len(found), sum(found)) for path, found in sizes.items()]


def _paths(name: str) -> Iterator[str]:
    """Yield all beginnings of a path: a, a.b and a.b.c of a.b.c."""
    return accumulate(name.split("."), lambda path, leaf: f"{path}.{leaf}")


def _checked(base: Base, name: str, tensor: Tensor, source: Weight) -> Weight:
    packed = isinstance(source, PackedTensor)
    linear = name.removesuffix(".weight") in base.architecture.linear_layers()
    if base.stored.quantized and linear and not packed:
        raise ConfigError(
            f"model.base: {base.name} is quantized, but its {name} is not in 4 bits, as all linear layers must be. "
            "Give the 16-bit model; quant.type quantizes it."
        )
    if packed and name not in base.architecture.quantizable():
        raise ConfigError(
            f"model.base: {name} is in 4 bits in {base.name}, but the run computes with it in 16. Give the 16-bit"
            " model; quant.type quantizes it."
        )
    if source.shape != tensor.shape:
        raise ConfigError(
            f"model.base: {name} is {list(source.shape)} in {base.name}, {list(tensor.shape)} by config.json. "
            "Copy the model again."
        )
    readable = WEIGHT_DTYPES if tensor.is_floating_point() else tuple(SOURCE_DTYPES)
    if source.dtype not in readable and not packed:
        raise ConfigError(f"model.base: {name} is of type {source.dtype}. Readable are {', '.join(readable)}.")
    return source


def _check_tied(base: Base, name: str, one: Weight, other: Weight) -> None:
    """Raises `ConfigError` if the files hold two different weights for one weight of the model.

    transformers would load both and warn. Only some parts of large weights are compared, because two trained heads
    differ everywhere."""
    if not (isinstance(one, TensorSource) and isinstance(other, TensorSource) and one.dtype == other.dtype):
        return
    count, size = numel(one), min(numel(one), _COMPARED)
    begins = {(count - size) * part // _PARTS for part in range(_PARTS + 1)}
    if any(one.read(begin, begin + size) != other.read(begin, begin + size) for begin in sorted(begins)):
        raise ConfigError(
            f"model.base: {base.name} has two weights for {name}, which differ, where its config.json has one"
            ' (tie_word_embeddings). Write "tie_word_embeddings": false into its config.json, at the top and in its'
            " text_config, or copy the model again."
        )


def left_out_of(model: dict[str, Any]) -> list[LeftOutPart]:
    """The `left_out` parts of the base that the settings `model` name, for processes without torch.

    Raises as `find_all_weights` and `resolve_base`.
    """
    settings = Model(**model)
    return find_all_weights(resolve_base(settings), settings.layers).left_out
