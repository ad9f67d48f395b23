"""The values of our kernels, in Triton's interpreter on a CPU, beside those of PyTorch's operators.

    TRITON_INTERPRET=1 python -m tests.kernels.interpret [PART ...]

The interpreter rounds to bf16 by cutting off, and a GPU does not, so values are compared in fp16 and fp32: every place,
mask and order is that of the kernel for bf16, whose rounding tests/kernels/code.py looks for in the machine code.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from unittest.mock import patch

import torch
from torch import Tensor

from tests.kernels import mixtures, places, products
from tests.kernels.held import FORMATS, Format, stack_of
from trainer.model.held import dither
from trainer.model.held.formats import stored
from trainer.model.held.formats.stored import KeptCodes
from trainer.model.kernels import decode, move

SHAPES = {
    # The last program of a matrix is short, or the only one; an odd number of weights; tiles that are cut off.
    "short": (3, 40, 96),
    "odd": (2, 7, 33),
    "programs": (2, 160, 384),
}


def decoding(*, quick: bool = False) -> None:
    """The bits of every format's operators: of a whole stack, and of some of its matrices."""
    for form in FORMATS.values():
        for shape in [SHAPES["programs"]] if quick else SHAPES.values():
            if not form.of_blocks and not _has_groups(form, shape):
                continue
            for rounded, dtype in (("F16", torch.float16), ("F32", torch.float32))[: 1 if quick else 2]:
                _decoded(form, shape, rounded, dtype, quick=quick)
    print("decoding: interpreted")


def tilings() -> None:
    """Each unit of a matrix has the scale of the tile that its weights lie in, also where borders cut tiles off. Where
    codes are moved, a unit lies in one row, and both numbers of its place are those of its weights."""
    shapes = (1, 96), (1, 100), (1, 128), (6, 96), (6, 80), (5, 33), (7, 128)
    for kernel, (rows, columns), (down, across), bits in product(
        (decode, move), shapes, ((1, 32), (1, 24), (1, 128), (2, 16), (4, 64), (9, 200)), (4, 8)
    ):
        case = kernel.__name__, rows, columns, down, across, bits
        if (tiles := kernel.tiling((rows, columns), (down, across), bits)) is None:
            continue
        place, units = torch.arange(rows * columns), torch.arange(rows * columns) // tiles.unit
        row, column = place // columns, place % columns
        if tiles.per:
            found = units // tiles.per
        else:
            of_units, unit = units // tiles.row_units, units % tiles.row_units
            found = of_units // tiles.tile_rows * tiles.row_tiles + unit // tiles.tile_units
        expected = row // down * -(-columns // across) + column // across
        assert torch.equal(found, expected), case
        assert tiles.unit * bits >= 8
        if kernel is move:
            assert columns % tiles.unit == 0, case
            assert torch.equal(units // tiles.row_units, row), case
    assert decode.tiling((6, 33), (1, 3), 4) is None, "two codes of a byte"
    assert move.tiling((7, 128), (9, 200), 8) is not None
    print("tilings: as their tiles")


def _has_groups(form: Format, shape: tuple[int, int, int]) -> bool:
    """Whether files have such a matrix: two codes of 4 bits a byte of a row, and no group of a row that is cut off."""
    width = shape[1] if form.transposed else shape[2]
    in_4_bits = form.numbers in ("int4", "e2m1")
    return not (in_4_bits and width % 2) and (form.tile[0] != 1 or width % (form.tile[1] or width) == 0)


def _decoded(form: Format, shape: tuple[int, int, int], rounded: str, dtype: torch.dtype, *, quick: bool) -> None:
    held = form.form(shape, rounded)
    stack = stack_of(held, shape, dtype)
    for first, last in ((1, shape[0]),) if quick else ((0, shape[0]), (1, shape[0]), (0, 1)):
        found, expected = held.by_kernel(stack, first, last, None), held.matrices(stack, first, last)
        assert found is not None, form.name
        assert found.stride() == expected.stride()
        assert same(found, expected), (form.name, shape, dtype, first, last)


@dataclass(frozen=True)
class Change:
    """What is added to the weights of a stack, `values` (rows of all matrices, columns), in the order of the model."""

    values: Tensor
    name: str = "layers.0.weight"

    @staticmethod
    def of(decoded: Tensor) -> "Change":
        """Some weights move by less than a step, others by several or beyond the last code, some by what is no number,
        and some stay."""
        drawn = torch.Generator().manual_seed(len(decoded))
        neighbours = decoded.float().flatten(0, 1).roll(1, 1)
        size = torch.tensor([0.0, -0.0, 0.003, 0.05, 1.0, -100.0, 1e30])
        return Change(neighbours * size[torch.randint(0, len(size), neighbours.shape, generator=drawn)])

    def change(self, first: int, rows: int, columns: slice = slice(None)) -> Tensor:
        return self.values[first : first + rows, columns].clone()


def moving(*, quick: bool = False) -> None:
    """The bits of what operators move and decode, with portions of whole matrices and of tiles."""
    for form in FORMATS.values():
        for shape in [SHAPES["short"]] if quick else SHAPES.values():
            if form.of_blocks or not _has_groups(form, shape):
                continue
            for rounded, dtype in (("F32", torch.float32), ("F16", torch.float16))[: 1 if quick else 2]:
                for portion in (2**23,) if quick else (2**23, 2 * shape[1] * shape[2], 17 * shape[2]):
                    _moved(form, shape, rounded, dtype, portion, quick=quick)
    for name in ("int4, rows", "fp8, whole"):  # a matrix of a single row, which has one scale
        _moved(FORMATS[name], (3, 1, 256), "F32", torch.float32, 2**23, quick=quick)
    _moved_at_thresholds()
    print("moving: interpreted")


def _moved_at_thresholds() -> None:
    """Weights that move as far as their thresholds, or by an error of rounding less."""
    shape = SHAPES["short"]
    held = FORMATS["int8, rows"].form(shape, "F32")
    assert isinstance(held, KeptCodes)
    stack = stack_of(held, shape, torch.float32)
    stack.weight.data.fill_(128)  # the least number
    rows, scales = torch.arange(shape[0] * shape[1]), stack.part("scales").view(torch.float32)
    at = dither.thresholds(Change.name, rows, torch.arange(shape[2])) * 2.0**-dither.UNIT
    by = Change((1 - at) * scales[:, None])
    expected = held.moved(stack, 0, shape[0], by)
    moves = float((expected != held.matrices(stack, 0, shape[0])).float().mean())
    assert 0.5 < moves < 0.999, moves
    assert same(held.by_kernel(stack, 0, shape[0], by), expected)


def _moved(
    form: Format, shape: tuple[int, int, int], rounded: str, dtype: torch.dtype, portion: int, *, quick: bool
) -> None:
    held = form.form(shape, rounded)
    assert isinstance(held, KeptCodes)
    stack = stack_of(held, shape, dtype)
    decoded = held.matrices(stack, 0, shape[0])
    by = Change.of(decoded)
    expected = held.moved(stack, 0, shape[0], by)
    moves = float((expected != decoded).float().mean())
    assert dtype == torch.float16 or 0.2 < moves < 0.9, f"{moves:.0%} of {form.name} move"
    with patch.object(stored, "_AT_ONCE", portion):
        for first, last in ((1, shape[0]),) if quick else ((0, shape[0]), (1, shape[0])):
            found = held.by_kernel(stack, first, last, by)
            assert found is not None, form.name
            assert found.stride() == expected.stride()
            assert same(found, expected[first:last]), (form.name, shape, dtype, portion, first, last)


def moving_controls() -> None:
    """With any of these changes some bits differ."""
    moving(quick=True)
    for line, other in {
        "tl.div_rn(by, scale + tl.zeros_like(by))": "by * tl.div_rn(tl.full(by.shape, 1.0, tl.float32), scale + by * 0)",
        'tl.where(tl.abs(steps) < float("inf"), steps, 0.0)': "steps",
        ") ^ negative) &": ")) &",
        "less | ((code == SIGN) & (size == 0))": "less",
        "tl.where((code & (SIGN - 1)) == SIGN - 1, code, found)": "found",
        "tl.maximum(linear, size": "(size",
        "code ^ FLIPPED).to": "code).to",
        "slice_across + column": "column",
        "slice_down + row": "row",
    }.items():
        with places.changed(move, line, other) as module, patch.dict(sys.modules, {move.__name__: module}):
            try:
                moving(quick=True)
            except AssertionError:
                continue
        raise SystemExit(f"the checks do not notice {other} in place of {line}")
    print("moving with other lines: noticed")


def same(found: Tensor | None, expected: Tensor) -> bool:
    """Whether all numbers are the same to the bit, and those that are none are in the same places."""
    assert found is not None
    number = ~expected.isnan()
    bits = {2: torch.int16, 4: torch.int32}[expected.itemsize]
    left, right = (one.contiguous().view(bits)[number] for one in (found, expected))
    return found.shape == expected.shape and torch.equal(number, ~found.isnan()) and torch.equal(left, right)


def quick() -> None:
    """One case of each format and kernel."""
    tilings()
    decoding(quick=True)
    moving(quick=True)
    mixtures.values()
    mixtures.recomputations()
    products.products(products.SIZES[:2])
    products.tiles()


PARTS: dict[str, Callable[[], None]] = {
    "tilings": tilings,
    "decoding": decoding,
    "moving": moving,
    "mixtures": mixtures.interpret,
    "products": products.interpret,
    "places": places.decoding,
    "places of moving": places.moving,
    "places of mixtures": places.mixtures,
    "places of products": places.products,
    "controls": places.controls,
    "controls of moving": moving_controls,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        {**PARTS, "quick": quick}[part]()
