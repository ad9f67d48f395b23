"""Where the weights of the model are in the files, from their headers alone: checked before any weight is read."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from trainer.base.base import Base
from trainer.base.composite import composite_model, language_names
from trainer.base.config_json import read_by_transformers
from trainer.base.conversion import Conversion, Weight, convert
from trainer.base.filling import SOURCE_DTYPES
from trainer.errors import ConfigError
from trainer.model.parts import tied_names
from trainer.safetensors_index import WEIGHT_DTYPES, PackedTensor

# transformers computes these anew, and old files hold them.
_COMPUTED = (r"rotary_emb\.inv_freq$",)


@dataclass(frozen=True)
class FoundWeights:
    """The source of each parameter and persistent buffer of a model, by name.

    A tied parameter is there under its first name. `copies` are what the files hold under its other names.
    """

    sources: dict[str, Weight] = field(default_factory=dict[str, Weight])
    copies: dict[str, list[Weight]] = field(default_factory=dict[str, list[Weight]])


def find_weights(base: Base, model: PreTrainedModel, layers: int | None = None) -> FoundWeights:
    """Where the files of `base` hold the weights of `model`, which transformers built of its config.json and may be on `meta`.

    With `layers` the model is cut to the first so many, and the files' other layers are left out on purpose.

    Raises:
        ConfigError: the files lack one, have it in another shape or in a type that cannot be read, or have a tensor that the
            model has not.
    """
    found = _convert(base, model)
    for name, reason in found.failed.items():
        raise ConfigError(
            f"model.base: {name} cannot be made of what {base.name} has for it ({reason}). Copy the model again."
        )
    weights, tied, state = FoundWeights(), tied_names(model), model.state_dict()
    for name, tensor in state.items():
        there, original = found.sources.get(name), tied.get(name, name)
        if there is not None and original in weights.sources:
            weights.copies.setdefault(original, []).append(_checked(base, name, tensor, there))
        elif there is not None:
            weights.sources[original] = _checked(base, name, tensor, there)
    for name in state:
        if tied.get(name, name) not in weights.sources:
            raise ConfigError(
                f"model.base: {base.name} has no tensor {name}, which its architecture needs. Copy the model again."
            )
    check_no_other(base, found.others, model._keys_to_ignore_on_load_unexpected or (), layers)
    return weights


def _convert(base: Base, model: PreTrainedModel) -> Conversion:
    """The tensors in the files by the names in `model`; of a model that sees or hears as well, those of its language model."""
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
    )


def check_no_other(base: Base, others: dict[str, str], ignored: Iterable[str], layers: int | None) -> None:
    """Raises `ConfigError` when the files have a tensor that the model has no place for, `others` as in a `Conversion`.

    Such a model is not the one that config.json describes: a bias or a layer would be left out without a word. `ignored`
    are patterns that transformers ignores as well.
    """
    left_out = [*ignored, *_COMPUTED]
    unknown = [
        key
        for key, name in others.items()
        if not any(re.search(pattern, name) for pattern in left_out) and not _is_beyond(name, layers)
    ]
    if unknown:
        raise ConfigError(
            f"model.base: {base.name} has the tensor {unknown[0]}, which the architecture of its config.json has not "
            f"({len(unknown)} such tensors). Give the config.json that belongs to these files."
        )


def _is_beyond(name: str, layers: int | None) -> bool:
    """Whether a tensor belongs to a layer that the model was cut off before: the first number in a name is the layer's."""
    number = re.search(r"\.(\d+)\.", name)
    return layers is not None and number is not None and int(number[1]) >= layers


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
            f"model.base: {name} is in 4 bits in {base.name}, and is computed with in 16. Give the 16-bit model; quant.type "
            "quantizes it."
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
