"""Adafactor (arXiv:1804.04235): of a matrix, the second moment is kept as one number a row and one a column.

Without a first moment, and with the learning rate from outside: transformers' Adafactor with `scale_parameter` and
`relative_step` off. A rank has a flat part of a matrix. Its sums over rows and columns are added up over all ranks, and
so is the square of the update, so every rank keeps the same numbers, which are those of one rank that has all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from trainer.state.optimizer import Flat, FlatPart, Optimizer, Reduce, State

if TYPE_CHECKING:
    from torch import Tensor

# The paper's sections 6 and 7.2: the decay of step t is 1 - t^-0.8, the update's root mean square at most 1.
_DECAY_EXPONENT, _EPS = -0.8, 1e-30


_ROW, _COLUMN, _ELEMENT = "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"


class _Run(NamedTuple):
    """Elements of a part that are whole rows of one matrix, or a piece of one row: where they are in `rows` and
    `columns`, each counted over all matrices of the parameter, and in the part."""

    rows: slice
    columns: slice
    elements: slice

    def of(self, part: Tensor) -> Tensor:
        """(rows, columns), a view."""
        return part[self.elements].view(self.rows.stop - self.rows.start, -1)


class Adafactor:
    """One second moment for each row and each column of a matrix, or for each element of a vector."""

    settings: ClassVar[Collection[str]] = ()

    def states(self, shape: tuple[int, ...]) -> tuple[State, ...]:
        if len(shape) < 2:
            return (State(_ELEMENT),)
        return State(_ROW, length=prod(shape[:-1])), State(_COLUMN, length=prod(shape[:-2]) * shape[-1])

    def step_bytes(self, portion: int, largest: int, on_gpu: bool) -> int:
        """The gradient and the update."""
        return 8 * portion

    def update(self, flat: Flat, gradient: Tensor, settings: Mapping[str, Any], step: int, reduce: Reduce) -> None:
        import torch

        _take_means(flat, gradient, 1 - step**_DECAY_EXPONENT, reduce)
        updates = gradient.clone()
        for part in flat.parts:
            _scale(part, part.of(updates))
        squares = torch.stack([torch.linalg.vector_norm(part.of(updates)).square() for part in flat.parts])
        reduce(squares, "sum")
        lr = settings["lr"]
        for part, square in zip(flat.parts, squares.tolist(), strict=True):
            size = (square / prod(part.shape)) ** 0.5
            weights = part.of(flat.values)
            weights.mul_(1 - lr * settings["weight_decay"])
            weights.sub_(part.of(updates), alpha=lr / max(1.0, size))  # the root of their mean square is at most 1


def _take_means(flat: Flat, gradient: Tensor, decay: float, reduce: Reduce) -> None:
    """Have the states take in the squared gradient: of a matrix, its means over each row and each column.
    Collective.
    """
    import torch

    factored = [part for part in flat.parts if len(part.shape) > 1]
    lengths = [state.length for part in factored for state in Adafactor().states(part.shape) if state.length]
    sums = torch.zeros(sum(lengths), device=gradient.device)
    rows_and_columns = iter(sums.split(lengths))
    for part in factored:
        by_row, by_column = next(rows_and_columns), next(rows_and_columns)
        for run in _runs(part):
            values = run.of(part.of(gradient))
            by_row[run.rows] += torch.linalg.vector_norm(values, dim=1).square()
            by_column[run.columns] += torch.linalg.vector_norm(values, dim=0).square()
    if lengths:
        reduce(sums, "sum")
    rows_and_columns = iter(sums.split(lengths))
    for part in factored:
        for state, size in ((_ROW, part.shape[-1]), (_COLUMN, part.shape[-2])):
            mean = next(rows_and_columns) / size + _EPS
            part.states[state].lerp_(mean, 1 - decay)
    for part in flat.parts:
        if len(part.shape) < 2:
            part.states[_ELEMENT].lerp_(part.of(gradient).square().add_(_EPS), 1 - decay)


def _scale(part: FlatPart, update: Tensor) -> None:
    """Divide the gradient by the root of what the states say of its square, in place."""
    if len(part.shape) < 2:
        update.mul_(part.states[_ELEMENT].rsqrt())
        return
    rows = part.states[_ROW].view(-1, part.shape[-2])
    by_row = (rows / rows.mean(dim=1, keepdim=True)).rsqrt_().view(-1)
    by_column = part.states[_COLUMN].rsqrt()
    for run in _runs(part):
        run.of(update).mul_(by_row[run.rows, None]).mul_(by_column[run.columns])


def _runs(part: FlatPart) -> Iterator[_Run]:
    """The part's elements, as few runs as cover them."""
    height, width = part.shape[-2:]
    begin = part.begin
    while begin < part.end:
        row, column = divmod(begin, width)
        matrix = row // height
        if column or part.end - begin < width:
            end = min(part.end, (row + 1) * width)
        else:
            end = min(part.end - part.end % width, (matrix + 1) * height * width)
        columns = slice(matrix * width + column, matrix * width + column + min(width, end - begin))
        yield _Run(slice(row, -(-end // width)), columns, slice(begin - part.begin, end - part.begin))
        begin = end


OPTIMIZERS: dict[str, Optimizer] = {"adafactor": Adafactor()}
ABOUT = {"adafactor": "the second moment of a matrix as one number for each row and each column; no first moment"}
