"""Codes are moved by a dither: unbiased, the same in any pieces, and never where nothing changes."""

from typing import Any, get_args
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn

from trainer.model.held.codes import VALUES, Code, KeptWeight, Numbers
from trainer.model.held.dither import _BITS, UNIT, moved, packed, thresholds, unpacked
from trainer.model.held.formats import stored
from trainer.model.held.formats.stored import KeptCodes
from trainer.model.held.layers import (
    HeldLinear,
    HeldStack,
    dequantized_once,
    multiply_moved,
    multiply_moved_back,
    weight_of,
)
from trainer.tuning.experts import StackUpdate
from trainer.tuning.linear_adapters import LowRankUpdate
from trainer.tuning.lora.layer import AdaptedLinear, multiply_through
from trainer.tuning.method import Moved

NUMBERS = get_args(Numbers)
ROWS, COLUMNS = 300, 400


def places(name: str = "w") -> Tensor:
    return thresholds(name, torch.arange(ROWS), torch.arange(COLUMNS))


def random_codes(numbers: Numbers) -> Tensor:
    return torch.randint(0, len(VALUES[numbers]), (ROWS, COLUMNS), generator=torch.Generator().manual_seed(3)).byte()


def values(numbers: Numbers, codes: Tensor) -> Tensor:
    return torch.tensor(VALUES[numbers], dtype=torch.float32)[codes.int()]


@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_code_stays_where_nothing_changes(numbers: Numbers) -> None:
    codes, nothing = random_codes(numbers), torch.zeros(ROWS, COLUMNS)
    for steps in (nothing, -nothing, nothing / 0, torch.full_like(nothing, torch.inf)):
        for at in (places(), None):
            assert torch.equal(moved(numbers, codes, steps, at), codes)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_weight_becomes_one_of_the_two_numbers_beside_it_and_is_itself_in_the_mean(numbers: Numbers) -> None:
    codes = random_codes(numbers)
    known = values(numbers, codes)
    sought = known + 0.03 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4)) + 0.01
    grid = torch.tensor(sorted({float(value) for value in VALUES[numbers] if value == value}))
    inside = known.abs() < grid.max()
    found = values(numbers, moved(numbers, codes, sought - known, places()))
    above = torch.searchsorted(grid, sought).clamp(1, len(grid) - 1)
    assert bool(((found == grid[above]) | (found == grid[above - 1]) | (found == known))[inside].all())
    error, spread = (found - sought)[inside], (found - known)[inside].std()
    assert error.mean().abs() < 4 * spread / inside.sum() ** 0.5
    change = (sought - known)[inside]
    assert ((found - known)[inside] @ change / (change @ change)) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_without_a_dither_the_nearest_code_is_taken(numbers: Numbers) -> None:
    codes = random_codes(numbers)
    sought = values(numbers, codes) + 0.4 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4))
    found = values(numbers, moved(numbers, codes, sought - values(numbers, codes), None))
    grid = torch.tensor([float(value) for value in VALUES[numbers] if value == value])
    real = ~sought.isnan()
    nearest = (sought[real][:, None] - grid).abs().min(1).values
    torch.testing.assert_close((found[real] - sought[real]).abs(), nearest, rtol=1e-5, atol=1e-4)


def test_thresholds_are_a_function_of_the_place_alone() -> None:
    whole = places()
    part = thresholds("w", torch.arange(100, 130), torch.arange(7, 50))
    assert torch.equal(part, whole[100:130, 7:50])
    assert not torch.equal(places("other"), whole)
    assert int(whole.min()) >= 0
    assert int(whole.max()) < 2**22
    # Evenly spread, and independent of the neighbours.
    assert whole.float().mean() / 2**22 == pytest.approx(0.5, abs=0.02)
    pairs = torch.stack([whole[:-1].flatten(), whole[1:].flatten()]).double()
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.15


@pytest.mark.parametrize(
    ("numbers", "dithered", "nearest"),
    [
        ("e2m1", 0xCED047BC, 0x548637E4),
        ("e4m3", 0xB3EB3860, 0x2A39F326),
        ("int4", 0xAFA6ADAE, 0x447FD7BD),
        ("int8", 0x7970C3BE, 0x9432A849),
        ("offset8", 0x940D4E09, 0x8857C72E),
    ],
)
def test_every_version_moves_the_same_codes(numbers: Numbers, dithered: int, nearest: int) -> None:
    """So an export holds the codes that a run was trained through, also by an earlier version."""
    codes, drawn = random_codes(numbers), torch.Generator().manual_seed(9)
    steps = torch.randint(-(2**10), 2**10, codes.shape, generator=drawn) * 2.0**-9  # the same in every version of torch
    found = [crc32(moved(numbers, codes, steps.clone(), at).numpy().tobytes()) for at in (places(), None)]
    assert found == [dithered, nearest]


def test_codes_of_4_bits_are_packed_as_files_have_them() -> None:
    assert packed(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]
    assert unpacked(torch.tensor([[0x21, 0x0F]], dtype=torch.uint8), 4).tolist() == [[1, 2, 15, 0]]


def test_a_change_is_the_same_in_whatever_order_its_products_are_summed() -> None:
    """So the export finds the codes of a forward pass on another device, whose kernels sum in another order."""
    drawn = torch.Generator().manual_seed(6)
    up, down = (torch.randn(*shape, generator=drawn).bfloat16().float() for shape in ((ROWS, 64), (64, COLUMNS)))
    up *= torch.randn(64, generator=drawn).mul(3).exp2()  # columns of very different sizes
    up = up.bfloat16().float()
    whole = LowRankUpdate(up, down, 2 / 3).change(0, ROWS)
    found = dict[str, Tensor]()
    for seed in range(20):
        order = torch.randperm(64, generator=drawn.manual_seed(seed))
        changed = LowRankUpdate(up[:, order], down[order], 2 / 3)
        assert torch.equal(changed.change(0, ROWS), whole)
        assert torch.equal(changed.change(7, 30, slice(5, 90)), whole[7:37, 5:90])
        stack = StackUpdate(up[:, order].view(3, -1, 64), down[order].expand(3, -1, -1), 2 / 3)
        assert torch.equal(stack.change(90, 130), whole[90:220])
        each = ROWS // 3
        assert torch.equal(stack.change(each, 2 * each, slice(5, 90)), whole[each : 3 * each, 5:90])
        found[f"fp32, order {seed}"] = changed.product(0, ROWS)
    assert not all(torch.equal(of_order, found["fp32, order 0"]) for of_order in found.values())


def in_codes(inputs: int = 64) -> HeldLinear:
    """A layer of 48 outputs in INT4, with two tiles to a row."""
    drawn = torch.Generator().manual_seed(1)
    kept = KeptWeight(Code("int4", (1, 32)), "BF16", "BF16")
    layer = HeldLinear(inputs, 48, KeptCodes(kept), torch.float32)
    codes = torch.randint(0, 256, (48 * inputs // 2,), generator=drawn).byte()
    scales = (torch.rand(48 * 2, generator=drawn) + 0.5).mul(0.02).bfloat16().view(torch.uint8)
    layer.weight, layer.scales = (nn.Parameter(part, requires_grad=False) for part in (codes, scales))
    return layer


@pytest.mark.parametrize("scaling", [0.5, 2 / 3])
@pytest.mark.parametrize("inputs", [64, 40])
def test_a_layer_through_codes_multiplies_by_them_and_its_gradients_are_those_of_the_sum(
    inputs: int, scaling: float
) -> None:
    layer, drawn = in_codes(inputs), torch.Generator().manual_seed(2)
    layer.bias = nn.Parameter(torch.randn(48, generator=drawn), requires_grad=False)
    down = nn.Parameter(0.1 * torch.randn(4, inputs, generator=drawn))
    up = nn.Parameter(0.1 * torch.randn(48, 4, generator=drawn))
    x, grad = torch.randn(9, inputs, generator=drawn, requires_grad=True), torch.randn(9, 48, generator=drawn)

    codes = layer.form.moved(layer, 0, 1, Moved("w", LowRankUpdate(up.data, down.data, scaling)))[0]
    assert not torch.equal(codes, weight_of(layer))
    result = multiply_through(x, AdaptedLinear(layer, down, up, scaling, None), "w")
    torch.testing.assert_close(result, x @ codes.T + layer.bias)
    found = torch.autograd.grad(result, [x, down, up], grad)

    summed = x @ (weight_of(layer) + scaling * up @ down).T
    _, of_down, of_up = torch.autograd.grad(summed, [x, down, up], grad)
    torch.testing.assert_close(found[0], grad @ codes)
    torch.testing.assert_close(found[1], of_down)
    torch.testing.assert_close(found[2], of_up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_fp32_does_not_round_the_products_of_codes_and_scales(dtype: torch.dtype) -> None:
    """The compressed-tensors package does the same: it decodes in the type that the model is loaded in."""
    layer = in_codes()
    layer.dtype = dtype
    codes = unpacked(layer.weight.data.view(48, 32), 4).int() - 8
    scales = layer.part("scales").view(torch.bfloat16).view(48, 2).float().repeat_interleave(32, 1)
    exact = codes * scales
    assert not torch.equal(exact, exact.bfloat16().float())
    assert torch.equal(weight_of(layer).float(), exact.to(dtype).float())
    assert torch.equal(moved_by_nothing(layer).float(), exact.to(dtype).float())


class Given:
    """The change of a stack's matrices, one below another."""

    name = "w"

    def __init__(self, every: Tensor) -> None:
        self._every = every

    def change(self, first: int, rows: int, columns: slice = slice(None)) -> Tensor:
        return self._every[first : first + rows, columns].clone()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_a_stack_move_by_the_places_of_the_model_also_where_files_have_their_transposes(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in gpt-oss. The rows of files that are moved at once may be of two experts."""
    monkeypatch.setattr(stored, "_ON_CPU", 7 * 64)
    drawn = torch.Generator().manual_seed(5)
    kept = KeptWeight(Code("e2m1", (1, 32)), "F8_E8M0", "BF16", transposed=transposed)
    rows, columns = (64, 10) if transposed else (10, 64)
    stack = HeldStack((3, rows, columns), KeptCodes(kept), torch.float32)
    codes = torch.randint(0, 256, (3, 10, 32), generator=drawn).byte()
    exponents = torch.randint(125, 130, (3, 10, 2), generator=drawn).byte()
    for name, part in (("weight", codes), ("scales", exponents)):
        setattr(stack, name, nn.Parameter(part.flatten(), requires_grad=False))
    every = 0.3 * torch.randn(3 * rows, columns, generator=drawn)
    expected = list[Tensor]()
    for matrix in range(3):
        own, places = unpacked(codes[matrix], 4), torch.arange(rows * matrix, rows * (matrix + 1))
        scales = torch.exp2(exponents[matrix].float() - 127).repeat_interleave(32, 1)
        change, at = every[places], thresholds("w", places, torch.arange(columns))
        if transposed:
            change, at = change.T, at.T.contiguous()
        found = moved("e2m1", own, change / scales, at)
        assert not torch.equal(found, own)
        made = values("e2m1", found) * scales
        expected.append(made.T if transposed else made)
    for first, last in ((0, 3), (1, 3), (2, 3)):
        assert torch.equal(stack.matrices(first, last, Given(every)), torch.stack(expected[first:last]))


@pytest.mark.parametrize(("rows", "tile_rows"), [(4, 1), (40, 1), (40, 8), (40, 40), (40, 64), (37, 8), (6, 3)])
def test_a_kernel_gets_whole_matrices_or_whole_tiles_of_one(
    rows: int, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_AT_ONCE", 10 * 32)  # ten rows
    portions = list(stored._portions(3, (rows, 32), tile_rows))
    assert [row for begin, end in portions for row in range(begin, end)] == list(range(3 * rows))
    for begin, end in portions:
        if rows <= 10:
            assert begin % rows == end % rows == 0
        else:
            assert begin // rows == (end - 1) // rows
            assert begin % rows % min(tile_rows, rows) == 0 or tile_rows >= rows
        assert end - begin <= 10
    assert len(portions) <= 3 * -(-rows // 8)


def test_a_weight_is_moved_once_for_all_tiles_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = in_codes(), torch.randn(3, 64)
    by, plain, calls = Given(torch.full((48, 64), 0.01)), layer.form.moved, list[int]()

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return plain(*given)

    monkeypatch.setattr(type(layer.form), "moved", lambda _, *given: counted(*given))
    expected = multiply_moved(x, layer, None, by)
    assert not torch.equal(expected, multiply_moved(x, layer, None, Given(torch.zeros(48, 64))))
    calls.clear()
    with dequantized_once():
        for _ in range(3):
            assert torch.equal(multiply_moved(x, layer, None, by), expected)
            assert multiply_moved_back(torch.ones(3, 48), layer, by).shape == x.shape
    assert len(calls) == 1
    multiply_moved(x, layer, None, by)
    assert len(calls) == 2, "it is not kept"


def moved_by_nothing(layer: HeldLinear) -> Tensor:
    return layer.form.moved(layer, 0, 1, Moved("w", LowRankUpdate(torch.zeros(48, 1), torch.zeros(1, 64), 1.0)))[0]


def test_no_threshold_is_an_end_of_its_range() -> None:
    """Each is in the middle of one of 2**bits equal parts, so a step of 0 moves nothing and one of 1 always does."""
    found, part = thresholds("a", torch.arange(40), torch.arange(50)), 2 ** (UNIT - _BITS)
    assert bool((found % part == part // 2).all())
