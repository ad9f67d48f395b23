"""Which stored tensors make each parameter of the model, from the headers of the files alone."""

import re
from collections.abc import Collection, Iterable, Iterator

from trainer.base.base import Base
from trainer.errors import ConfigError
from trainer.safetensors_index import Stacked, StoredTensor, TensorSource, numel

WEIGHT_DTYPES = ("BF16", "F16", "F32")


def find_source(base: Base, name: str, shape: tuple[int, ...]) -> StoredTensor:
    """The tensor in the files that holds the parameter `name`, or a stack of them where experts are stored singly.

    Raises:
        ConfigError: they lack it, have it in another shape, or in a type that cannot be read.
    """
    names = (name,) if name in base.weights else base.architecture.stored_names(name)
    slices = shape[0] if len(shape) == 3 else 1
    # Experts that are stored singly: (experts, rows, columns) of files that have rows / parts of each.
    part_shape = shape if len(names) == 1 else (shape[1] * slices // len(names), shape[2])
    parts = tuple(_checked(base, stored, part_shape) for stored in names)
    if len({part.dtype for part in parts}) > 1:
        raise ConfigError(
            f"model.base: the experts of {name} are of several types in {base.name}. Copy the model again."
        )
    return parts[0] if len(parts) == 1 else Stacked(parts, shape)


def stored_parts(base: Base, name: str, shape: tuple[int, ...]) -> Iterator[tuple[TensorSource, int]]:
    """Every tensor of the files that holds elements of the parameter `name`, with the number of the first of these.

    Raises `ConfigError` as `find_source` does.
    """
    source = find_source(base, name, shape)
    begin = 0
    for part in source.parts if isinstance(source, Stacked) else (source,):
        assert isinstance(part, TensorSource)
        yield part, begin
        begin += numel(part)
    for alias, of in base.architecture.tied.items():
        # Some files hold a tied weight twice; transformers unties what differs.
        if of == name and alias in base.weights:
            again = _checked(base, alias, shape)
            assert isinstance(again, TensorSource)
            yield again, 0


def _checked(base: Base, name: str, shape: tuple[int, ...]) -> StoredTensor:
    source = base.weights.get(name)
    if source is None:
        raise ConfigError(
            f"model.base: {base.name} has no tensor {name}, which its architecture needs. Copy the model again."
        )
    if source.shape != shape:
        raise ConfigError(
            f"model.base: {name} is {list(source.shape)} in {base.name}, {list(shape)} by config.json. "
            "Copy the model again."
        )
    if source.dtype not in WEIGHT_DTYPES:
        raise ConfigError(f"model.base: {name} is of type {source.dtype}. Readable are {', '.join(WEIGHT_DTYPES)}.")
    return source


def check_no_other(base: Base, known: Collection[str], ignored: Iterable[str], layers: int | None) -> None:
    """Raises `ConfigError` when the files have a tensor that is none of `known`, those that make up the model's parameters.

    Such a model is not the one that config.json describes: a bias or a layer would be left out without a word. `ignored`
    are patterns that transformers ignores as well; with `layers` the rest of the base is left out on purpose.
    """
    left_out = [*ignored, r"rotary_emb\.inv_freq$"]
    left_out += [f"^{re.escape(alias)}$" for alias in base.architecture.tied]
    if layers:
        left_out.append(r"^model\.layers\.")
    others = [
        name for name in base.tensors if name not in known and not any(re.search(pattern, name) for pattern in left_out)
    ]
    if others:
        raise ConfigError(
            f"model.base: {base.name} has the tensor {others[0]}, which the architecture of its config.json has not "
            f"({len(others)} such tensors). Give the config.json that belongs to these files."
        )
