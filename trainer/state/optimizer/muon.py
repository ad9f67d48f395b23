"""Muon makes the momentum of each matrix orthogonal, and this is the update of the matrix (Jordan et al., 2024,
kellerjordan.github.io/posts/muon).

The updates are scaled to the size of AdamW's (arXiv:2502.16982, equation 4), so the same learning rates hold. Vectors
learn by AdamW. A rank has only a flat part of a matrix. So the ranks put whole momenta together, some matrices at a
time; each rank makes them orthogonal, and takes its own part of the result. The arithmetic is that of torch.optim.Muon.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.state.optimizer import Flat, FlatPart, Optimizer, Reduce, State, adamw_step

if TYPE_CHECKING:
    from torch import Tensor

_MOMENTUM, _MOMENTS = "momentum_buffer", ("exp_avg", "exp_avg_sq")
_COEFFICIENTS, _ITERATIONS, _EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
_ADAMW_SIZE = 0.2
# Elements that are exchanged together. Adapters have hundreds of small matrices.
_EXCHANGED = 2**24


class Muon:
    """A momentum of each element of a matrix, 4 bytes; of vectors AdamW's two moments."""

    settings: ClassVar[Collection[str]] = ("momentum", "betas", "eps")

    def states(self, shape: tuple[int, ...]) -> tuple[State, ...]:
        return (State(_MOMENTUM),) if len(shape) > 1 else tuple(State(moment) for moment in _MOMENTS)

    def step_bytes(self, portion: int, largest: int, on_gpu: bool) -> int:
        """The gradient; the matrices that are exchanged together, in fp32; and three of one in 16 bits."""
        return 4 * portion + 10 * max(largest, min(portion, _EXCHANGED))

    def update(self, flat: Flat, gradient: Tensor, settings: Mapping[str, Any], step: int, reduce: Reduce) -> None:
        lr, decay = settings["lr"], 1 - settings["lr"] * settings["weight_decay"]
        for part in flat.parts:
            part.of(flat.values).mul_(decay)
            if len(part.shape) < 2:
                _step_vector(part, part.of(flat.values), part.of(gradient), settings, step)
        for parts in _together([part for part in flat.parts if len(part.shape) > 1]):
            for part, whole in zip(parts, _whole(parts, gradient, settings["momentum"], reduce), strict=True):
                for number, matrix in enumerate(whole.view(-1, *part.shape[-2:])):
                    _take(part, number, orthogonal(matrix), part.of(flat.values), lr)


def _together(parts: Sequence[FlatPart]) -> Iterator[list[FlatPart]]:
    """The parts in their order, so many at a time as are exchanged together."""
    gathered, size = list[FlatPart](), 0
    for part in parts:
        if gathered and size + math.prod(part.shape) > _EXCHANGED:
            yield gathered
            gathered, size = [], 0
        gathered.append(part)
        size += math.prod(part.shape)
    if gathered:
        yield gathered


def _whole(parts: Sequence[FlatPart], gradient: Tensor, momentum: float, reduce: Reduce) -> Sequence[Tensor]:
    """The updates of whole parameters, by Nesterov's momentum, flat. Collective."""
    import torch

    sizes = [math.prod(part.shape) for part in parts]
    every = torch.zeros(sum(sizes), device=gradient.device)
    for part, values in zip(parts, every.split(sizes), strict=True):
        own, buffer = part.of(gradient), part.states[_MOMENTUM]
        buffer.lerp_(own, 1 - momentum)
        values[part.begin : part.end] = own.lerp(buffer, momentum)
    reduce(every, "sum")
    return every.split(sizes)


def orthogonal(matrix: Tensor) -> Tensor:
    """(rows, columns) -> the matrix of the same singular vectors, whose singular values are near 1: five steps of
    Newton and Schulz in bfloat16."""
    import torch

    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    tall = len(x) > len(x.T)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _take(part: FlatPart, number: int, update: Tensor, values: Tensor, lr: float) -> None:
    """Take this rank's elements of the update of matrix `number` of a parameter, in place."""
    size = update.numel()
    begin, end = max(part.begin, number * size), min(part.end, (number + 1) * size)
    if begin < end:
        taken = update.reshape(-1)[begin - number * size : end - number * size]
        values[begin - part.begin : end - part.begin].add_(
            taken, alpha=-lr * _ADAMW_SIZE * math.sqrt(max(update.shape))
        )


def _step_vector(part: FlatPart, values: Tensor, gradient: Tensor, settings: Mapping[str, Any], step: int) -> None:
    """AdamW's step; its decay was taken."""
    first, second = (part.states[moment] for moment in _MOMENTS)
    beta1, beta2 = settings["betas"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    adamw_step(values, first, second, settings, step)


OPTIMIZERS: dict[str, Optimizer] = {"muon": Muon()}
ABOUT = {
    "muon": (
        "one momentum, 4 bytes for each element that learns, orthogonalised for each matrix; vectors use AdamW with the"
        " same lr"
    )
}
