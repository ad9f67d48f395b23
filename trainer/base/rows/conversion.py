"""Finds out which stored tensors make up each parameter, with transformers' own conversion of checkpoints.

transformers renames the tensors of a checkpoint, and makes some parameters from several of them: it stacks the experts,
concatenates gate and up, or splits a fused projection. Here the same operations run on numbers instead of weights, one
number for each row of a stored tensor. The result says which stored row each row of a parameter is. An operation that
needs values, such as a transposition, is applied when the values are read (`Converted`, `Transposed`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from trainer.base.partitions.filling import SOURCE_DTYPES, as_tensor
from trainer.base.partitions.reading import PIECE_BYTES, PIECES_IN_FLIGHT
from trainer.base.rows.packed_parts import Weight, join_packed, unpacked
from trainer.base.stored.shared.cached_values import LastMade
from trainer.errors import first_line
from trainer.store.safetensors_index import DTYPE_BYTES, Joined, StoredTensor, Stretch, TensorSource, item_bytes

Shape = tuple[int, ...]


@dataclass
class Conversion:
    """The files' tensors as transformers assigns them to the model.

    `sources` are by name in the model's `state_dict`. Each has the shape that the files give it, which may differ from
    the model's. `failed` says why a parameter cannot be made from its stored tensors. `others` maps each stored tensor
    without a place in the model to the name that it would have there. `beside` are the other weights of a model that
    also processes pictures or sound, by their names there; its language model has no place for them.
    """

    sources: dict[str, Weight] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    beside: dict[str, Weight] = field(default_factory=dict)


def convert(model: PreTrainedModel, stored: Mapping[str, Weight]) -> Conversion:
    """Assign the tensors `stored`, by name, to the parameters and persistent buffers of `model`.

    `model` may be on `meta`. No weight is read. The steps are those of transformers'
    `convert_and_load_state_dict_in_model`.
    """
    found, operations = Conversion(), _Operations(model)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    jobs: dict[str, _Job] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            found.others[key] = name
        elif pattern is not None:
            jobs.setdefault(name, _Job(name, by_pattern[pattern])).add(pattern, key, stored[key])
        elif name in found.sources:
            found.others[key] = name  # a second tensor for the same name; transformers takes the first
        else:
            found.sources[name] = stored[key]
    for job in jobs.values():
        try:
            found.sources |= operations.sources(job)
        except Exception as error:  # an operation may raise any error if tensors do not fit together
            found.failed[job.name] = f"{len(job.keys)} tensors such as {job.keys[0]}: {first_line(error)}"
    return found


@dataclass
class _Job:
    """The parameter `name`, or the first of several, and the tensors, by pattern, from which a converter makes it."""

    name: str
    converter: WeightConverter
    tensors: dict[str, list[Weight]] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    def add(self, pattern: str, key: str, tensor: Weight) -> None:
        self.tensors.setdefault(pattern, []).append(tensor)
        self.keys.append(key)

    @property
    def parts(self) -> list[Weight]:
        return [part for parts in self.tensors.values() for part in parts]

    @property
    def shapes(self) -> list[Shape]:
        return [part.shape for part in self.parts]

    def apply(self, model: Any, config: Any, values: Iterable[Tensor]) -> dict[str, Tensor]:
        """Apply the converter's operations to `values` in place of the parts."""
        given = iter(values)
        return self.apply_to(model, config, {p: [next(given) for _ in parts] for p, parts in self.tensors.items()})

    def apply_to(self, model: Any, config: Any, values: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        converter: Any = deepcopy(self.converter)
        converter.collected_tensors = values
        made = converter.convert(self.name, model=model, config=config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


# Readers run a few pieces ahead of each other, so keep as many slices as the pieces in flight may need.
_KEPT_BYTES = 2 * PIECES_IN_FLIGHT * PIECE_BYTES


_MATRICES_KEPT = 2  # because pieces of two matrices may be in flight


@dataclass(frozen=True)
class StoredPart:
    """A stored tensor from its element `begin` on, as a tensor of `shape`."""

    tensor: StoredTensor
    begin: int
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: StoredTensor) -> "StoredPart":
        return cls(tensor, 0, tensor.shape)

    @classmethod
    def of(cls, tensor: StoredTensor, index: int) -> "StoredPart":
        """One slice along the first axis, with the same number of axes."""
        return cls(tensor, index * math.prod(tensor.shape[1:]), (1, *tensor.shape[1:]))

    def values(self) -> Tensor:
        return as_tensor(self.tensor.read(self.begin, self.begin + math.prod(self.shape)), self.tensor).view(self.shape)


@dataclass(frozen=True)
class _Recipe:
    """How a parameter is made from a job's parts.

    It consists of these stretches of rows. With None, moving rows is not enough, and the values are converted.
    """

    shape: Shape
    stretches: tuple[Stretch, ...] | None


class _Operations:
    """Runs the operations of converters. It tries only one of several equal layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._config = model, model.config
        self._known: dict[Any, _Recipe] = {}
        self._last_made = LastMade[Tensor]()

    def sources(self, job: _Job) -> dict[str, Weight]:
        """Name -> source, for each parameter that the job makes. Raises errors of the operations, or `ValueError`."""
        if len({part.dtype for part in job.parts}) > 1:
            raise ValueError("they are of several types")
        counts = tuple(len(parts) for parts in job.tensors.values())
        shape = tuple(self._model.get_parameter_or_buffer(job.name).shape)
        alike = (id(job.converter), *job.tensors, counts, *job.shapes, shape)
        recipes = {job.name: self._known[alike]} if alike in self._known else self._recipes(job)
        if list(recipes) == [job.name]:
            self._known[alike] = recipes[job.name]
        return {name: self._source(job, name, recipe) for name, recipe in recipes.items()}

    def _recipes(self, job: _Job) -> dict[str, _Recipe]:
        given = [torch.empty(shape, device="meta") for shape in job.shapes]
        made = job.apply(self._model, self._config, given)
        shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
        kept = {name: index for name, tensor in made.items() for index, part in enumerate(given) if part is tensor}
        stretches = {name: (Stretch(index, 0, math.prod(shapes[name])),) for name, index in kept.items()}
        if len(stretches) < len(shapes):
            stretches |= self._stretches(job, shapes)
        return {name: _Recipe(shape, stretches.get(name)) for name, shape in shapes.items()}

    def _stretches(self, job: _Job, shapes: dict[str, Shape]) -> dict[str, tuple[Stretch, ...]]:
        """Name -> the stretches of the job's parts that make up a parameter, if the operations only move rows.

        The parameters have these `shapes`."""
        numbers, widths = _row_numbers(job.shapes), {_width(shape) for shape in job.shapes}
        last = int(numbers[-1].max())
        try:
            found = job.apply(self._model, self._config, numbers)
            mirrored = job.apply(self._model, self._config, [last - part for part in numbers])
        except Exception:  # other operations may raise any error for such narrow tensors
            return {}
        return {
            name: _join(rows.flatten()[:: _columns(shapes[name])], job.shapes)
            for name, rows in found.items()
            # Operations that only move rows do so for any numbers in them.
            if widths == {_width(shapes[name])}
            and _are_rows(rows, shapes[name])
            and torch.equal(last - rows, mirrored[name])
        }

    def _source(self, job: _Job, name: str, recipe: _Recipe) -> Weight:
        stretches, parts = recipe.stretches, job.parts
        if stretches is not None and len(stretches) == 1 and parts[stretches[0].part].shape == recipe.shape:
            return parts[stretches[0].part]
        if stretches is not None and (packed := join_packed(parts, stretches, recipe.shape)):
            return packed
        stored = {pattern: [unpacked(part) for part in given] for pattern, given in job.tensors.items()}
        readable = tuple(part for given in stored.values() for part in given)
        if stretches is not None:
            return Joined(readable, stretches, recipe.shape)
        slices = self._slices(job, name, recipe.shape, stored)
        model = _OneSlice((recipe.shape[0] // len(slices), *recipe.shape[1:]))

        def make(index: int) -> Tensor:
            values = {pattern: [part.values() for part in parts] for pattern, parts in slices[index].items()}
            return job.apply_to(model, self._config, values)[name]

        return Converted(recipe.shape, readable[0].dtype, len(slices), make, self._last_made)

    def _slices(
        self, job: _Job, name: str, shape: Shape, stored: dict[str, list[StoredTensor]]
    ) -> list[dict[str, list[StoredPart]]]:
        """The values, by pattern, from which each slice along the first axis is made. A single entry if slices mix."""
        count, ones = shape[0], [1] * (len(shape) - 1)
        in_order = torch.arange(count).view(-1, *ones)
        slices: list[dict[str, list[StoredPart]]] = [{} for _ in range(count)]
        numbers: dict[str, list[Tensor]] = {}
        for pattern, parts in stored.items():
            if len(parts) == 1 and len(parts[0].shape) == len(shape) and parts[0].shape[0] == count:
                made = [StoredPart.of(parts[0], index) for index in range(count)]
                numbers[pattern] = [in_order]
            elif len(parts) == count and len(parts[0].shape) == len(ones):
                made = [StoredPart.whole(part) for part in parts]
                numbers[pattern] = [number.view(ones) for number in in_order]
            else:
                break
            for part, inputs in zip(made, slices, strict=True):
                inputs[pattern] = [part]
        if len(ones) > 1 and len(numbers) == len(stored):
            found = job.apply_to(_OneSlice(shape), self._config, numbers)[name]
            # Each slice of the result shows the number of the slice from which it is made.
            if len(found) == count and bool((found == in_order).all()):
                return slices
        return [{pattern: [StoredPart.whole(part) for part in parts] for pattern, parts in stored.items()}]


@dataclass(frozen=True)
class _OneSlice:
    """Replaces the model for operations that ask for the shape of the parameter that they make."""

    shape: Shape

    def get_parameter(self, _name: str) -> Tensor:
        return torch.empty(self.shape, device="meta")


def _width(shape: Shape) -> int:
    """The elements of a row. Rows lie along the last axis; in a tensor with one axis each element is a row."""
    return shape[-1] if len(shape) > 1 else 1


def _columns(shape: Shape) -> int:
    """How many numbers stand for a row of a tensor of this shape. Four reveal every operation that moves columns."""
    return 4 if len(shape) > 1 else 1


def _row_numbers(shapes: Sequence[Shape]) -> list[Tensor]:
    """Numbers that replace tensors of these shapes, int32.

    They are consecutive in each row, and skip the numbers of one row between tensors.
    """
    numbers, start = list[Tensor](), 0
    for shape in shapes:
        like = (*shape[:-1], _columns(shape)) if len(shape) > 1 else shape
        end = start + math.prod(like)
        numbers.append(torch.arange(start, end, dtype=torch.int32).view(like))
        start = end + _columns(shape)
    return numbers


def _are_rows(numbers: Tensor, shape: Shape) -> bool:
    """Whether `numbers`, made by `_row_numbers`, are whole rows in a tensor of this shape."""
    like = (*shape[:-1], _columns(shape)) if len(shape) > 1 else shape
    if numbers.dtype != torch.int32 or numbers.shape != like:
        return False
    rows = numbers.reshape(-1, _columns(shape))
    return bool((rows % _columns(shape) == torch.arange(_columns(shape))).all())


def _join(rows: Tensor, shapes: Sequence[Shape]) -> tuple[Stretch, ...]:
    """Join rows, given by their first numbers, (rows,) int32, into stretches of the tensors of these shapes."""
    columns, width = _columns(shapes[0]), _width(shapes[0])
    rows = rows // columns
    starts = torch.tensor([0, *accumulate(math.prod(shape) // width + 1 for shape in shapes)])
    breaks = torch.nonzero(rows[1:] != rows[:-1] + 1).flatten() + 1
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), breaks])
    counts = torch.diff(begins, append=torch.tensor([len(rows)]))
    firsts = rows[begins]
    parts = torch.bucketize(firsts, starts, right=True) - 1
    offsets = firsts - starts[parts]
    return tuple(
        Stretch(part, width * offset, width * count)
        for part, offset, count in zip(parts.tolist(), offsets.tolist(), counts.tolist(), strict=True)
    )


@dataclass(frozen=True)
class Converted:
    """A parameter in equal `slices` along its first axis. `make` makes each from values that it reads whole."""

    shape: tuple[int, ...]
    dtype: str
    slices: int
    make: Callable[[int], Tensor] = field(repr=False)
    last_made: LastMade[Tensor] = field(repr=False)

    def read(self, begin: int, end: int) -> bytearray:
        data, size = bytearray(), math.prod(self.shape) // self.slices
        most = max(2, _KEPT_BYTES // (size * DTYPE_BYTES[self.dtype]))
        for index in range(begin // size, -(-end // size)):
            values = self.last_made.get((id(self), index), most, lambda at=index: self._flat(at))
            part = values[max(begin - index * size, 0) : end - index * size]
            data += part.view(torch.uint8).numpy().tobytes()
        return data

    def _flat(self, index: int) -> Tensor:
        # An operation may convert its result to the parameter's type. Undo that, because the loader sets the type.
        return self.make(index).to(SOURCE_DTYPES[self.dtype]).contiguous().flatten()


@dataclass(frozen=True)
class Transposed:
    """A matrix whose `transpose` is stored.

    Reading its own rows needs the whole stored tensor, which is read only once if `last_made` keeps it.
    """

    transpose: TensorSource
    last_made: LastMade[Tensor] = field(repr=False, compare=False)
    together = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.transpose.shape[::-1]

    @property
    def dtype(self) -> str:
        return self.transpose.dtype

    def read(self, begin: int, end: int) -> bytearray:
        size, stored = item_bytes(self.transpose), self.transpose
        data = self.last_made.get((stored.key, stored.offset), _MATRICES_KEPT, self._bytes)
        return bytearray(data.numpy().data[size * begin : size * end])

    def _bytes(self) -> Tensor:
        return StoredPart.whole(self.transpose).values().t().contiguous().flatten().view(torch.uint8)
