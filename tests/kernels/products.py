"""Grouped products by our kernels, beside PyTorch's of each group, in Triton's interpreter.

Rows and matrices are small whole numbers, of which all sums are exact: results must be equal to the last bit.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from trainer.model.kernels import grouped, multiply
from trainer.model.kernels.grouped import Groups

CASES = {  # rows of each group
    "one row": [1],
    "empty groups first, between and last": [0, 0, 5, 0, 17, 0],
    "whole tiles and one more": [16, 32, 17, 15, 33],
    "one group has all": [0, 70, 0],
    "more groups than rows": [0] * 20 + [1, 0, 2] + [0] * 20,
    "nobody": [0, 0, 0],
}
SIZES = (32, 32), (24, 70), (33, 16)  # inputs and outputs: whole tiles, and tiles that are cut off


def numbers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def groups_of(sizes: list[int]) -> Groups:
    experts = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Groups(experts[:, None], len(sizes))


def products(sizes_of_matrices: Sequence[tuple[int, int]] = SIZES) -> None:
    """By matrices in both orders in memory, and with other rows, through the way that a mixture takes."""
    with (
        patch.multiple(multiply, ROWS=16, WIDE=32, INNER=16),
        patch.object(grouped, "lacks_grouped_products", lambda device: True),
    ):
        for case, sizes in CASES.items():
            groups, ends = groups_of(sizes), [0, *torch.tensor(sizes).cumsum(0).tolist()]
            for inputs, outputs in sizes_of_matrices:
                rows, others = numbers(sum(sizes), inputs).half(), numbers(sum(sizes), outputs).half()
                for matrices in (numbers(len(sizes), inputs, outputs), numbers(len(sizes), outputs, inputs).mT):
                    made = groups.product(rows, matrices.half())
                    parts = [rows[a:b].float() @ matrices[e] for e, (a, b) in enumerate(pairwise(ends))]
                    assert torch.equal(made, torch.cat(parts).half()), (case, inputs, outputs)
                expected = torch.stack([rows[a:b].float().mT @ others[a:b].float() for a, b in pairwise(ends)])
                assert torch.equal(groups.outer(rows, others), expected.half()), (case, inputs, outputs)
            some = numbers(len(sizes), 32, 8).half()[1:]
            if len(sizes) > 1:  # fewer groups than all
                rows = numbers(sum(sizes), 32).half()
                plain = torch.cat([rows[a:b] @ one for one, (a, b) in zip(some, list(pairwise(ends))[1:], strict=True)])
                assert torch.equal(groups.product(rows, some, 1), plain), case


def tiles() -> None:
    """Every row of every group is in one tile, whatever the sizes are."""
    generator = torch.Generator().manual_seed(3)

    def some(least: int, most: int, *shape: int) -> Tensor:
        return torch.randint(least, most, shape, generator=generator)

    for _ in range(100):
        size, sizes = 2 ** int(some(0, 6)), some(0, 50, int(some(1, 40)))
        offsets = (sizes * (sizes % 2)).cumsum(0).int()
        seen = torch.zeros(int(offsets[-1]), dtype=torch.int64)
        found: Any = multiply.tiles_of(offsets, len(seen), size)
        for group, begin, end in zip(*(part.tolist() for part in found), strict=True):
            if group >= 0:
                assert (offsets[group - 1] if group else 0) <= begin < end == offsets[group]
                seen[begin : min(begin + size, end)] += 1
        assert bool((seen == 1).all())


def interpret() -> None:
    products()
    tiles()
    print("products: interpreted")
