"""Layers of a merged model in INT4, NVFP4, MXFP4 and FP8: their scales, and codes that a change moves."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trainer.model.held import WeightError, dither
from trainer.model.held.grids import GRIDS, second_of_nvfp4

ROWS, COLUMNS = 384, 256


class Learnt:
    """A change of each weight, and rounding by thresholds or to the nearest code."""

    def __init__(self, change: Tensor, *, dithered: bool) -> None:
        self.change, self.dithered = change, dithered

    def of_rows(self, first: int, count: int, values: Callable[[], Tensor]) -> Tensor:
        return self.change[first : first + count].clone()

    def thresholds(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        return dither.thresholds("w", rows, columns) if self.dithered else None


@pytest.mark.parametrize(
    ("code", "largest", "scales"),
    [
        ("int4", [7.5, 3.75], [1.0, 0.5]),  # half a step beyond 7, and half a step below -8
        ("nvfp4", [0.001, 6.0, 1e9], [2.0**-9, 1.0, 448.0]),  # none is 0 or beyond its type
        ("mxfp4", [4.0, 7.9, 8.0, 0.5], [127, 127, 128, 124]),  # exponents plus 127, and the largest code is below 8
        ("fp8", [448.0, 224.0], [1.0, 0.5]),
    ],
)
def test_the_largest_weight_of_a_tile_decides_its_scale(code: str, largest: list[float], scales: list[float]) -> None:
    assert GRIDS[code].scaled(torch.tensor(largest)).tolist() == scales


def test_the_second_scale_of_nvfp4_makes_the_largest_of_the_others_448() -> None:
    assert (second_of_nvfp4(6.0), second_of_nvfp4(0.0)) == (448.0, 1.0)


def encoded(code: str, weights: Tensor, by: Learnt | None, rows: int) -> tuple[bytes, list[int], float]:
    """The bytes of a matrix that comes in pieces of so many rows, its codes and those that have moved, and the error."""
    error, counts = WeightError(), [0, 0]

    def seen(codes: int, moved: int) -> None:
        counts[0] += codes
        counts[1] += moved

    grid = replace(GRIDS[code], by=by, seen=seen)
    found = b"".join(grid.encode(iter(weights.split(rows)), (ROWS, COLUMNS), error))
    return found, counts, error.relative


@pytest.mark.parametrize("dithered", [True, False])
@pytest.mark.parametrize("code", GRIDS)
def test_each_row_moves_by_its_own_change_in_whatever_pieces_it_comes(code: str, dithered: bool) -> None:
    drawn = torch.Generator().manual_seed(1)
    weights, change = torch.randn(ROWS, COLUMNS, generator=drawn), torch.zeros(ROWS, COLUMNS)
    change[300] = -2 * weights[300]
    change[301:] = 0.02 * torch.randn(ROWS - 301, COLUMNS, generator=drawn)
    learnt = Learnt(change, dithered=dithered)
    whole, counts, error = encoded(code, weights, learnt, ROWS)
    pieces, *others = encoded(code, weights, learnt, 128)
    assert whole == pieces
    assert others == [counts, pytest.approx(error)]
    assert counts[0] == ROWS * COLUMNS
    assert COLUMNS // 2 < counts[1] < (ROWS - 300) * COLUMNS, "of rows that have learnt"
    assert error < {"int4": 0.12, "nvfp4": 0.13, "mxfp4": 0.15, "fp8": 0.04}[code]
    plain, none, _ = encoded(code, weights, None, 128)
    row = COLUMNS * GRIDS[code].code.bits // 8
    assert none == [ROWS * COLUMNS, 0]
    assert plain[: 300 * row] == whole[: 300 * row]
    assert plain[300 * row : 301 * row] != whole[300 * row : 301 * row]
    assert plain[ROWS * row :] == whole[ROWS * row :], "scales are those of the base"


@pytest.mark.parametrize("code", GRIDS)
def test_layers_that_stay_as_they_are_are_named_in_the_configuration(code: str) -> None:
    told = GRIDS[code].configuration(["lm_head", "model.layers.0.mlp.gate"])
    stay = told["modules_to_not_convert" if code == "fp8" else "ignore"]
    assert stay == ["lm_head", "model.layers.0.mlp.gate"]
    assert told["quant_method"] == ("fp8" if code == "fp8" else "compressed-tensors")
    if code == "fp8":
        assert told["weight_block_size"] == [128, 128]
    else:
        (group,) = told["config_groups"].values()
        assert group["weights"]["group_size"] == GRIDS[code].code.tile[1]


def test_a_matrix_is_taken_if_both_sides_are_whole_tiles() -> None:
    taken = {name: [GRIDS[name].takes(shape) for shape in ((3, 32), (3, 48), (128, 64), (128, 256))] for name in GRIDS}
    assert taken == {
        "int4": [True, False, True, True],
        "nvfp4": [True, True, True, True],
        "mxfp4": [True, False, True, True],
        "fp8": [False, False, False, True],
    }
