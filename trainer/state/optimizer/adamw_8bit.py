"""AdamW whose moments are bytes, with a scale for each block of 256 (arXiv:2110.02861), as bitsandbytes computes it.

The blocks are those of the whole parameter, wherever ranks divide it. Where a border cuts a block, the two ranks agree
on its scale: one maximum over all ranks a step, of a few numbers a parameter. So the moments are those of one rank that
has all, bit by bit, and a checkpoint knows no world size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.state.optimizer import Flat, FlatPart, Optimizer, Reduce, State, adamw_step

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 256
# bitsandbytes keeps fp32 moments of parameters with fewer elements: norms and biases.
SMALLEST = 4096
_PIECE = 2**22  # elements that are updated at once, whose moments are in fp32 meanwhile
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    """Elements [begin, end) of a part, counted from the parameter's first. `cut` is its block's number where the rank
    has not all of the block; otherwise it begins at a block's border, and ends at one or with the parameter."""

    begin: int
    end: int
    cut: int | None

    def elements(self, part: FlatPart, values: Tensor) -> Tensor:
        """Its slice of one value an element of the part."""
        return values[self.begin - part.begin : self.end - part.begin]

    def blocks(self, part: FlatPart, scales: Tensor) -> Tensor:
        """Its slice of one value a block."""
        first = part.begin // BLOCK
        return scales[self.begin // BLOCK - first : -(-self.end // BLOCK) - first]


class AdamW8bit:
    """Both moments of each element, 2 bytes, and two scales a block; fp32 moments of the smallest parameters."""

    settings: ClassVar[Collection[str]] = ("betas", "eps")

    def states(self, shape: tuple[int, ...]) -> tuple[State, ...]:
        if math.prod(shape) < SMALLEST:
            return tuple(State(moment) for moment in _MOMENTS)
        scales = (State(f"{moment}_absmax", block=BLOCK) for moment in _MOMENTS)
        return *scales, *(State(moment, "U8") for moment in _MOMENTS)

    def step_bytes(self, portion: int, largest: int, on_gpu: bool) -> int:
        """The gradient, and both moments and two intermediate results of a piece, in fp32."""
        return 4 * portion + 16 * min(largest, _PIECE)

    def update(self, flat: Flat, gradient: Tensor, settings: Mapping[str, Any], step: int, reduce: Reduce) -> None:
        scales = _cut_scales(flat, gradient, settings, reduce)
        for number, part in enumerate(flat.parts):
            weights, gradients = part.of(flat.values), part.of(gradient)
            for piece in _pieces(part):
                moments = _moments(part, piece, gradients, settings)
                taken = piece.elements(part, weights)
                taken.mul_(1 - settings["lr"] * settings["weight_decay"])
                adamw_step(taken, *moments, settings, step)  # with the moments as they are before they become bytes
                for moment, values in zip(_MOMENTS, moments, strict=True):
                    _keep(part, piece, moment, values, scales.get((number, piece.cut, moment)))


def _pieces(part: FlatPart) -> Iterator[_Piece]:
    """Yield the part's elements in pieces: many whole blocks at once, but the elements of a cut block alone."""
    numel, begin = math.prod(part.shape), part.begin
    while begin < part.end:
        block = begin // BLOCK
        if begin > block * BLOCK or part.end < min(numel, (block + 1) * BLOCK):
            end = min(part.end, (block + 1) * BLOCK)
            yield _Piece(begin, end, block)
        else:
            whole = part.end if part.end == numel else part.end - part.end % BLOCK
            end = min(whole, begin + _PIECE)
            yield _Piece(begin, end, None)
        begin = end


def _cut_blocks(numel: int, share: int) -> list[int]:
    """Numbers of the blocks that borders cut, where every rank has `share` of `numel` elements."""
    return sorted({border // BLOCK for border in range(share, numel, share) if border % BLOCK})


def _cut_scales(
    flat: Flat, gradient: Tensor, settings: Mapping[str, Any], reduce: Reduce
) -> dict[tuple[int, int | None, str], Tensor]:
    """The scale of each cut block after this step, by part, block and moment: the largest over the ranks.
    Collective.
    """
    import torch

    keys: list[tuple[int, int | None, str]] = [
        (number, block, moment)
        for number, part in enumerate(flat.parts)
        if math.prod(part.shape) >= SMALLEST
        for block in _cut_blocks(math.prod(part.shape), part.share)
        for moment in _MOMENTS
    ]
    if not keys:
        return {}
    scales = torch.zeros(len(keys), device=flat.values.device)
    found = dict(zip(keys, scales.unbind(), strict=True))
    for number, part in enumerate(flat.parts):
        for piece in _pieces(part):
            if (number, piece.cut, _MOMENTS[0]) in found:
                moments = _moments(part, piece, part.of(gradient), settings)
                for moment, values in zip(_MOMENTS, moments, strict=True):
                    found[number, piece.cut, moment].copy_(values.abs().max())
    reduce(scales, "max")
    return found


def _moments(part: FlatPart, piece: _Piece, gradients: Tensor, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The piece's moments after this step, in fp32."""
    first, second = (_read(part, piece, moment) for moment in _MOMENTS)
    gradient, (beta1, beta2) = piece.elements(part, gradients), settings["betas"]
    return first.mul_(beta1).add_(gradient, alpha=1 - beta1), second.mul_(beta2).addcmul_(
        gradient, gradient, value=1 - beta2
    )


def _read(part: FlatPart, piece: _Piece, moment: str) -> Tensor:
    """The piece's moment in fp32, a copy."""
    from trainer.model.held.blockwise import dequantize_by

    kept = piece.elements(part, part.states[moment])
    if math.prod(part.shape) < SMALLEST:
        return kept.clone()
    scales = piece.blocks(part, part.states[f"{moment}_absmax"])
    return dequantize_by(_code(moment, kept.device), kept, scales, BLOCK)


def _keep(part: FlatPart, piece: _Piece, moment: str, values: Tensor, scale: Tensor | None) -> None:
    """Write the piece's moment. `scale` is that of its block, where it is cut."""
    import torch

    from trainer.model.held.blockwise import quantize_by

    kept = piece.elements(part, part.states[moment])
    if math.prod(part.shape) < SMALLEST:
        kept.copy_(values)
        return
    if scale is not None:
        # One more value, the largest of the whole block, gives the bytes that the values have in it.
        values = torch.cat([values, scale[None]])
    quantized, found = quantize_by(_code(moment, kept.device), values, BLOCK)
    kept.copy_(quantized[: len(kept)])
    piece.blocks(part, part.states[f"{moment}_absmax"]).copy_(found)


def _code(moment: str, device: Any) -> Tensor:
    """(256,) fp32: the value of each byte as a share of its block's scale. The second moment is never negative."""
    from trainer.model.held.blockwise import dynamic_code

    return dynamic_code(moment == "exp_avg", device)


OPTIMIZERS: dict[str, Optimizer] = {"adamw_8bit": AdamW8bit()}
ABOUT = {"adamw_8bit": "AdamW with 8-bit moments, 2 bytes for each element that learns"}
