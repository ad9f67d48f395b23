"""Rounding that looks at what a layer reads: GPTQ (arXiv:2210.17323), and descent after it, on rows of the run's data.

A dither lets the errors of a row's weights cancel on average. With the inputs x of a layer known, they can be chosen so
that they cancel on these inputs: for a row with errors e, the error of its outputs is e X^T X e^T. GPTQ rounds the
columns one after another, and makes up for the error of each by the columns that are still to come. Descent then looks
at each column again, and takes the code that is best beside all others.

The inputs are those of the merged model in fp32. It is computed a layer at a time: the weights of a layer come from the
base's files, wherever these are, take what was learnt, and are dropped after the layer. X^T X is kept for blocks of so
many columns, in files of a scratch folder. So memory holds a layer, its sums, and the rows' activations.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.base.base import Base
from trainer.base.describe.empty_model import unfilled_model
from trainer.base.describe.language_model import model_config
from trainer.base.partitions.filling import as_tensor
from trainer.base.rows.parameters import find_all_weights
from trainer.errors import ConfigError
from trainer.model.held import dither
from trainer.model.held.codes import VALUES, Numbers
from trainer.model.parts import decoder_layers
from trainer.store.safetensors_index import numel
from trainer.tuning.method import WeightUpdate

_BLOCK = 1024
"""The columns whose products are kept, so that a wide matrix needs no square of its width."""
_RUN = 64
"""The columns after which the errors of a run are added to the columns of the block that come later."""
_DAMPING = 0.01  # of the mean of the diagonal, as in the paper
_PASSES = 2


@dataclass(frozen=True)
class Calibration:
    """The products X^T X of the inputs of each weight that it has looked at, in files of `folder`."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)

    def blocks(self, name: str) -> Sequence["_Block"]:
        return _blocks(self.files[name])


@dataclass(frozen=True)
class _Block:
    """Some columns: X^T X of them, damped, and the upper factor of its inverse."""

    products: Tensor
    factor: Tensor


@lru_cache(maxsize=2)  # the pieces of a matrix come one after another
def _blocks(file: Path) -> tuple[_Block, ...]:
    return tuple(_Block(found, _factor(found)) for _, found in sorted(load_file(file).items()))


def _factor(products: Tensor) -> Tensor:
    inverse = torch.linalg.inv(products.double())
    return torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True).float()


def calibrate(
    base: Base, updates: Mapping[str, WeightUpdate], rows: Sequence[Tensor], folder: Path, say: Callable[[str], None]
) -> Calibration:
    """Compute the merged model on `rows` of tokens (T,), and keep the products of the inputs of its linear layers.

    Raises `ConfigError` for a model that has no decoder layers that follow each other.
    """
    model: Any = unfilled_model(model_config(base.directory, None), torch.float32, experts_implementation="eager")
    layers = list(decoder_layers(model) or ())
    if not layers:
        raise ConfigError(
            "rounding: gptq computes the base a layer at a time, and this one has no layers. Leave rounding out."
        )
    found = Calibration(folder)
    tokens, seen = _side_by_side(rows)
    weights = _Weights(base, updates)
    weights.fill_all_but(model, layers)
    names = {id(layer): path for path, layer in model.named_modules()}
    for number, layer in enumerate(layers):
        path = names[id(layer)]
        layer.register_forward_pre_hook(partial(weights.fill, f"{path}."))
        layer.register_forward_hook(partial(_drop, number, len(layers), say), always_call=True)
        for inner, module in layer.named_modules():
            if isinstance(module, nn.Linear) and (name := f"{path}.{inner}.weight") in updates:
                module.register_forward_pre_hook(partial(_keep, found, name, seen))
    decoder = model.get_decoder()
    with torch.no_grad():
        decoder(input_ids=tokens, use_cache=False)
    return found


def _side_by_side(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of tokens (rows, longest) and which of them there are. Those that fill rows up come last: none looks at
    them."""
    seen = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    tokens = torch.zeros(seen.shape, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], seen[number, : len(row)] = row, True
    return tokens, seen


class _Weights:
    """The weights of the merged model, each when it is asked for."""

    def __init__(self, base: Base, updates: Mapping[str, WeightUpdate]) -> None:
        self._sources: Mapping[str, Any] = find_all_weights(base).sources
        self._updates = updates

    def fill_all_but(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        inside = {id(part) for layer in layers for part in (*layer.parameters(), *layer.buffers())}
        head: Any = model.get_output_embeddings()  # type: ignore[operator]  # no predictions are needed
        self._fill(model, "", lambda part: id(part) not in inside, head)

    def fill(self, prefix: str, layer: nn.Module, _inputs: Any) -> None:
        self._fill(layer, prefix, lambda part: True)

    def _fill(
        self, module: nn.Module, prefix: str, chosen: Callable[[Tensor], bool], left_out: nn.Module | None = None
    ) -> None:
        for path, part in list(module.named_modules()):
            if part is left_out:
                continue
            for leaf, parameter in list(part.named_parameters(recurse=False)):
                if parameter.is_meta and chosen(parameter):
                    values = self._values(f"{prefix}{path}.{leaf}" if path else f"{prefix}{leaf}", parameter.shape)
                    setattr(part, leaf, nn.Parameter(values, requires_grad=False))
            for leaf, buffer in list(part.named_buffers(recurse=False)):
                if buffer.is_meta and chosen(buffer):
                    values = self._values(f"{prefix}{path}.{leaf}" if path else f"{prefix}{leaf}", buffer.shape)
                    part.register_buffer(leaf, values)

    def _values(self, name: str, shape: torch.Size) -> Tensor:
        source = self._sources[name]
        values = as_tensor(source.read(0, numel(source)), source).float()
        if (update := self._updates.get(name)) is not None:
            update.apply_to(values.view(-1), 0)
        return values.view(update.shape if update is not None else shape)


def _drop(number: int, count: int, say: Callable[[str], None], layer: nn.Module, _inputs: Any, _outputs: Any) -> None:
    for part in layer.modules():
        for leaf, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, leaf, nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False))
    if (number + 1) % 10 == 0 or number + 1 == count:
        say(f"rounding: looked at the inputs of {number + 1} of {count} layers")


def _keep(found: Calibration, name: str, seen: Tensor, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    (x,) = inputs
    x = x[seen] if x.shape[: seen.ndim] == seen.shape else x.flatten(0, -2)
    blocks = {}
    for number, part in enumerate(x.split(_BLOCK, -1)):
        products = part.T @ part
        products.diagonal().add_(_DAMPING * float(products.diagonal().mean()) + 1e-9)
        blocks[f"{number:04}"] = products
    file = found.folder / f"{len(found.files):06}.safetensors"
    save_file(blocks, file)
    found.files[name] = file


def rounded(numbers: Numbers, codes: Tensor, steps: Tensor, scales: Tensor, blocks: Sequence[_Block]) -> Tensor:
    """Return the codes (uint8) of whole rows (rows, columns) that had `codes` and should move by `steps` of scales."""
    grid, found, first = _Grid(numbers), codes.clone(), 0
    steps = steps.nan_to_num(0.0, 0.0, 0.0)
    for block in blocks:
        columns = slice(first, first + len(block.products))
        part = _Part(grid, codes[:, columns], steps[:, columns], scales[:, columns])
        found[:, columns] = part.descended(part.by_gptq(block.factor), block.products)
        first = columns.stop
    return found


class _Grid:
    def __init__(self, numbers: Numbers) -> None:
        self._numbers: Numbers = numbers
        self._values = torch.tensor(VALUES[numbers], dtype=torch.float32).nan_to_num(0.0)

    def values(self, codes: Tensor) -> Tensor:
        return self._values[codes.int()]

    def nearest(self, codes: Tensor, values: Tensor) -> Tensor:
        """The codes nearest to values, in units of scales, of weights that had `codes`."""
        return dither.moved(self._numbers, codes, values - self.values(codes), None)


@dataclass(frozen=True)
class _Part:
    """Some columns of whole rows."""

    grid: _Grid
    codes: Tensor
    steps: Tensor
    scales: Tensor

    def by_gptq(self, factor: Tensor) -> Tensor:
        """`factor` is that of the block's columns."""
        found = self.codes.clone()
        sought = (self.grid.values(self.codes) + self.steps) * self.scales
        for run in _runs(len(factor)):
            errors = torch.zeros_like(sought[:, run])
            for column in range(run.start, run.stop):
                scale, at = self.scales[:, column], column - run.start
                code = self.grid.nearest(self.codes[:, column], sought[:, column] / scale)
                error = (sought[:, column] - self.grid.values(code) * scale) / factor[column, column]
                found[:, column], errors[:, at] = code, error
                later = slice(column + 1, run.stop)
                sought[:, later] -= error[:, None] * factor[column, later]
            sought[:, run.stop :] -= errors @ factor[run, run.stop :]
        return found

    def descended(self, codes: Tensor, products: Tensor) -> Tensor:
        codes = codes.clone()
        errors = (self.grid.values(codes) - self.grid.values(self.codes) - self.steps) * self.scales
        pull = errors @ products
        for _ in range(_PASSES):
            for run in _runs(len(products)):
                made = torch.zeros_like(pull[:, run])
                for column in range(run.start, run.stop):
                    scale, before = self.scales[:, column], self.grid.values(codes[:, column])
                    wanted = before - pull[:, column] / (products[column, column] * scale)
                    code = self.grid.nearest(codes[:, column], wanted)
                    change = (self.grid.values(code) - before) * scale
                    codes[:, column], made[:, column - run.start] = code, change
                    pull[:, run] += change[:, None] * products[column, run]
                others = [slice(0, run.start), slice(run.stop, len(products))]
                for rest in others:
                    pull[:, rest] += made @ products[run, rest]
        return codes


def _runs(columns: int) -> Iterator[slice]:
    for first in range(0, columns, _RUN):
        yield slice(first, min(columns, first + _RUN))
