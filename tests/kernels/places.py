"""Places beyond 2**31 and 2**32: memory that is asked for and hardly touched, so that few pages of it exist.

The interpreter runs programs one after another, so that of a large launch the chosen ones alone are run.
"""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.interpreter import interpreter_builder  # pyright: ignore[reportMissingImports]

from trainer.model.held.blockwise import four_bit_code, nested_code
from trainer.model.kernels import decode, mixture, move, multiply

ROOT = Path(__file__).parents[2]


class Chosen:
    """A kernel of which these programs alone are run."""

    def __init__(self, kernel: Any, programs: Sequence[tuple[int, int]]) -> None:
        self._kernel, self._programs = kernel, programs

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            for along, across in self._programs:
                assert along < grid[0]

                def at(x: int, y: int, z: int, place: tuple[int, int, int] = (along, across, 0)) -> None:
                    interpreter_builder.grid_idx = place

                with patch.object(interpreter_builder, "set_grid_idx", at):
                    self._kernel[(1,)](*args, **options)

        return launch


def decoding(module: ModuleType = decode) -> None:
    """Three matrices of a few more than 2**31 weights each: groups of INT4, double quantized NF4, and groups of INT4
    with a code for zero each and a scale of scales for each row."""
    numel, device = 2**31 + 2 * module.WEIGHTS + 64, torch.device("cpu")
    generator = torch.Generator().manual_seed(1)
    a_slice = -(-numel // module.WEIGHTS)
    codes = torch.empty(3 * numel // 2, dtype=torch.uint8)
    for name, size in (("int4", 32), ("nf4", 64), ("zeros", 32)):
        scales, numbers = torch.empty(3 * numel // size, dtype=torch.bfloat16), module.Numbers("int4", 4, torch.float16)
        nested, beside, columns = None, module.Beside(), numel
        if name == "zeros":
            columns = 64
            seconds, zeros = torch.empty(3 * numel // columns), torch.empty(len(scales), dtype=torch.uint8)
            beside = module.Beside("over", seconds, zeros)
        if name == "nf4":
            scales = torch.empty(3 * numel // size, dtype=torch.uint8)
            numbers = module.Numbers("nf4", 4, torch.float16, four_bit_code("nf4", device), upper_first=True)
            of_scales = torch.full((3 * -(-numel // size // 256),), 0.25)
            nested = module.Nested(of_scales, torch.tensor([0.1, 0.2, 0.3]), nested_code(device), 256)
        tiles = module.tiling((numel // columns, columns), (1, size), 4)
        programs = [a_slice - 1, a_slice, 2 * a_slice, 3 * a_slice - 2, 3 * a_slice - 1]
        wanted, regions = list[torch.Tensor](), list[tuple[int, int]]()
        for program in programs:
            piece, part = divmod(program, a_slice)
            begin = piece * numel + part * module.WEIGHTS
            end = min(begin + module.WEIGHTS, (piece + 1) * numel)
            some = torch.randint(0, 256, ((end - begin) // 2,), dtype=torch.uint8, generator=generator)
            by = torch.randint(0, 256, ((end - begin) // size,), generator=generator).to(scales.dtype)
            codes[begin // 2 : end // 2], scales[begin // size : end // size] = some, by
            few = beside
            if beside.seconds is not None and beside.zeros is not None:
                beside.seconds[begin // columns : end // columns] = torch.rand((end - begin) // columns) + 0.5
                beside.zeros[begin // size : end // size] = torch.randint(0, 16, (len(by),), generator=generator)
                few = module.Beside(
                    "over", beside.seconds[begin // columns : end // columns], beside.zeros[begin // size : end // size]
                )
            small = nested and nested._replace(scales=torch.full((1,), 0.25), means=nested.means[piece : piece + 1])
            shape = (1, (end - begin) // min(columns, end - begin), min(columns, end - begin))
            wanted.append(module.decode_matrices(some, by, numbers, tiles, shape, torch.float16, small, few))
            regions.append((begin, end))
        with patch.object(module, "decode", Chosen(module.decode, [(program, 0) for program in programs])):
            shape = (3, numel // columns, columns)
            found = module.decode_matrices(codes, scales, numbers, tiles, shape, torch.float16, nested, beside)
        for (begin, end), expected in zip(regions, wanted, strict=True):
            assert torch.equal(found.view(-1)[begin:end], expected.view(-1)), (name, begin)
    print("places: interpreted")


def moving(module: ModuleType = move) -> None:
    """Three matrices of a few more than 2**31 weights each, in INT4 and transposed as gpt-oss has MXFP4."""
    columns, generator = 64, torch.Generator().manual_seed(1)
    rows = 2**31 // columns + 2 * module.WEIGHTS // columns + 1
    numel = rows * columns
    a_slice = -(-numel // module.WEIGHTS)
    programs = [a_slice - 1, a_slice, 2 * a_slice, 3 * a_slice - 2, 3 * a_slice - 1]
    codes = torch.empty(3 * numel // 2, dtype=torch.uint8)
    found = torch.empty(3, rows, columns, dtype=torch.float16)
    with tempfile.NamedTemporaryFile() as file:  # a sparse one, as a machine may give no memory of this size
        change = torch.from_file(file.name, True, 3 * numel).view(-1, columns)
    for name, transposed in (("int4", False), ("e2m1", True)):
        scales = torch.empty(3 * numel // 32, dtype=torch.bfloat16)
        seconds, zeros = torch.empty(3 * rows), torch.empty(len(scales), dtype=torch.uint8)
        down = torch.empty(rows if transposed else 3 * rows, dtype=torch.int32)
        across = torch.randint(0, 2**22, (3 * columns if transposed else columns,), generator=generator).int()
        numbers, tiles = decode.Numbers(name, 4, torch.float16), module.tiling((rows, columns), (1, 32), 4)
        wanted, regions = list[torch.Tensor](), list[tuple[int, int]]()
        for program in programs:
            piece, part = divmod(program, a_slice)
            first = part * module.WEIGHTS // columns
            few = min(module.WEIGHTS // columns, rows - first)
            begin = piece * rows + first
            of_rows, of_codes = slice(begin, begin + few), slice(begin * columns // 2, (begin + few) * columns // 2)
            of_tiles = slice(begin * columns // 32, (begin + few) * columns // 32)
            at = slice(first, first + few) if transposed else of_rows
            codes[of_codes] = torch.randint(0, 256, (few * columns // 2,), dtype=torch.uint8, generator=generator)
            scales[of_tiles] = torch.rand(few * columns // 32, generator=generator).add(0.5).bfloat16()
            zeros[of_tiles] = torch.randint(0, 16, (few * columns // 32,), dtype=torch.uint8, generator=generator)
            seconds[of_rows], change[of_rows] = 2.0, torch.randn(few, columns, generator=generator)
            down[at] = torch.arange(at.start, at.stop).mul_(40503).remainder_(2**22).int()
            beside = decode.Beside("over", seconds[of_rows], zeros[of_tiles])
            by = module.Moving(change[of_rows], down[at], across.view(-1, columns)[piece] if transposed else across)
            made = torch.empty(1, few, columns, dtype=torch.float16)
            module.decode_moved(codes[of_codes], scales[of_tiles], numbers, tiles, by, made, beside)
            wanted.append(made[0])
            regions.append((begin, begin + few))
        beside = decode.Beside("over", seconds, zeros)
        with patch.object(module, "move", Chosen(module.move, [(program, 0) for program in programs])):
            module.decode_moved(codes, scales, numbers, tiles, module.Moving(change, down, across), found, beside)
        for (begin, end), expected in zip(regions, wanted, strict=True):
            assert torch.equal(found.view(-1, columns)[begin:end], expected), (name, begin)
    print("places of moving: interpreted")


def mixtures(module: ModuleType = mixture) -> None:
    """The last of rows that are more than 2**32 values, gated forward and backward; and a token's sum of such rows."""
    rows, inner = 66, 2**25
    both, weights = torch.empty(rows, 2 * inner, dtype=torch.float16), torch.ones(rows)
    grads = torch.empty(rows, inner, dtype=torch.float16)
    some = torch.linspace(-2, 2, 2 * inner).half()
    both[-1], grads[-1] = some, some[:inner]
    found = list[list[torch.Tensor]]()
    wide = {"gate_rows": [(rows - 1, 0)], "gate_rows_back": [(rows - 1, 0)]}
    for given, grad, programs in (((some[None], weights[:1]), grads[-1:], {}), ((both, weights), grads, wide)):
        with ExitStack() as patches:
            patches.enter_context(patch.object(module, "_COLUMNS", 2**20))
            for name, chosen in programs.items():
                patches.enter_context(patch.object(module, name, Chosen(getattr(module, name), chosen)))
            learning = [one.requires_grad_() for one in given]
            result = module.gated(*learning)
            of_given = torch.autograd.grad(result, learning, grad)
            found.append([one[-1].detach() for one in (result, *of_given)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    tall = torch.empty(rows, 2 * inner, dtype=torch.float16)
    tall[-3:, -1024:] = torch.tensor([1.0, 2.0, 4.0])[:, None].half()
    places = torch.arange(rows - 1, -1, -1)
    with patch.object(module, "combine_rows", Chosen(module.combine_rows, [(0, 2 * inner // 1024 - 1)])):
        made = module.combined(tall, places, 3)
    assert bool((made[0, -1024:] == 7).all())
    print("places of mixtures: interpreted")


def products(module: ModuleType = multiply) -> None:
    """The last group's matrix, the last rows, and their results and products with others, each beyond 2**32 values."""
    groups, side, rows, long = 66, 2**13, 260, 2**24
    matrices = torch.empty(groups, side, side, dtype=torch.float16)
    matrices[-1] = torch.eye(side).half()
    offsets = torch.zeros(groups, dtype=torch.int32)
    offsets[-1] = 3
    few = torch.arange(3 * side).view(3, side).remainder(100).half()
    with patch.multiple(module, ROWS=16, WIDE=64, INNER=side):
        tiles = module.tiles_of(offsets, 3)
        with patch.object(module, "multiply_by_matrices", Chosen(module.multiply_by_matrices, [(side // 64 - 1, 0)])):
            found = module.by_matrices(few, matrices, tiles)
        assert torch.equal(found[:, -64:], few[:, -64:])

    tall, one = torch.empty(rows, long, dtype=torch.float16), torch.tensor([rows], dtype=torch.int32)
    tall[-4:] = 1
    with patch.multiple(module, ROWS=16, WIDE=16, INNER=2**16):
        tiles = module.tiles_of(one, rows)
        ones = torch.full((1, long, 16), 2**-24).half()
        with patch.object(module, "multiply_by_matrices", Chosen(module.multiply_by_matrices, [(16, 0)])):
            found = module.by_matrices(tall, ones, tiles)
        assert bool((found[-4:] == 1).all())
    with patch.multiple(module, ROWS=16, WIDE=16, INNER=4):
        tall[:, -16:] = 1
        with patch.object(module, "multiply_with_others", Chosen(module.multiply_with_others, [(0, long // 16 - 1)])):
            found = module.with_others(torch.ones(rows, 16).half(), tall, one)
        assert bool((found[0, :, -16:] == rows).all())
    print("places of products: interpreted")


PARTS: dict[str, tuple[ModuleType, Callable[[ModuleType], None]]] = {
    "products": (multiply, products),
    "decode": (decode, decoding),
    "mixture": (mixture, mixtures),
    "move": (move, moving),
}


def controls() -> None:
    """With places of 32 bits the same checks fail, or end by a signal."""
    for name in PARTS:
        done = subprocess.run([sys.executable, "-m", "tests.kernels.places", name], cwd=ROOT, capture_output=True)
        assert done.returncode, f"the checks do not notice places of 32 bits in {name}"
        print(f"places of 32 bits in {name}: exit {done.returncode}")


def _with_32_bits(name: str) -> None:
    module, check = PARTS[name]
    with changed(module, "tl.int64", "tl.int32") as other:
        check(other)


@contextmanager
def changed(module: ModuleType, line: str, by: str) -> Iterator[ModuleType]:
    """A module that has other words in its source."""
    source = Path(module.__file__ or "").read_text()
    assert line in source, line
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "changed.py")  # which Triton reads again
        file.write_text(source.replace(line, by))
        spec = importlib.util.spec_from_file_location("changed", file)
        assert spec
        assert spec.loader
        other = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(other)
        yield other


if __name__ == "__main__":
    _with_32_bits(sys.argv[1])
