"""The values of our kernels, in Triton's interpreter on a CPU, beside those of PyTorch's operators.

    TRITON_INTERPRET=1 python -m tests.kernels.interpret [PART ...]

The interpreter rounds to bf16 by cutting off, and a GPU does not, so values are compared in fp16 and fp32: every place,
mask and order is that of the kernel for bf16, whose rounding tests/kernels/code.py looks for in the machine code.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from tests.kernels import mixtures, places, products
from tests.kernels.held import FORMATS, Format, stack_of

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


def _has_groups(form: Format, shape: tuple[int, int, int]) -> bool:
    """Whether files have such a matrix: two codes of 4 bits a byte of a row, and no group of a row that is cut off."""
    width = shape[1] if form.transposed else shape[2]
    in_4_bits = form.numbers in ("int4", "e2m1")
    return not (in_4_bits and width % 2) and (form.tile[0] != 1 or width % (form.tile[1] or width) == 0)


def _decoded(form: Format, shape: tuple[int, int, int], rounded: str, dtype: torch.dtype, *, quick: bool) -> None:
    held = form.form(shape, rounded)
    stack = stack_of(held, shape, dtype)
    for first, last in ((1, shape[0]),) if quick else ((0, shape[0]), (1, shape[0]), (0, 1)):
        found, expected = held.by_kernel(stack, first, last), held.matrices(stack, first, last)
        assert found is not None, form.name
        assert found.stride() == expected.stride()
        assert same(found, expected), (form.name, shape, dtype, first, last)


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether all numbers are the same to the bit, and those that are none are in the same places."""
    number = ~expected.isnan()
    bits = {2: torch.int16, 4: torch.int32}[expected.itemsize]
    left, right = (one.contiguous().view(bits)[number] for one in (found, expected))
    return found.shape == expected.shape and torch.equal(number, ~found.isnan()) and torch.equal(left, right)


def quick() -> None:
    """One case of each format and kernel."""
    decoding(quick=True)
    mixtures.values()
    mixtures.recomputations()
    products.products()


PARTS: dict[str, Callable[[], None]] = {
    "decoding": decoding,
    "mixtures": mixtures.interpret,
    "products": products.interpret,
    "places": places.decoding,
    "places of mixtures": places.mixtures,
    "places of products": places.products,
    "controls": places.controls,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        {**PARTS, "quick": quick}[part]()
