"""Places beyond 2**31 and 2**32: memory that is asked for and hardly touched, so that few pages of it exist.

The interpreter runs programs one after another, so that of a large launch the chosen ones alone are run.
"""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.interpreter import interpreter_builder  # pyright: ignore[reportMissingImports]

from trainer.model.held.blockwise import four_bit_code, nested_code
from trainer.model.kernels import decode

ROOT = Path(__file__).parents[2]


class Chosen:
    """A kernel of which these programs alone are run."""

    def __init__(self, kernel: Any, programs: Sequence[int]) -> None:
        self._kernel, self._programs = kernel, programs

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            for program in self._programs:
                assert program < grid[0]
                interpreter_builder.set_grid_dim(*grid, *(1,) * (3 - len(grid)))
                with patch.object(interpreter_builder, "set_grid_idx", lambda x, y, z, program=program: at(program)):
                    self._kernel[(1,)](*args, **options)

        def at(program: int) -> None:
            interpreter_builder.grid_idx = (program, 0, 0)

        return launch


def decoding(module: ModuleType = decode) -> None:
    """Three matrices of a few more than 2**31 weights each: groups of INT4, and double quantized NF4."""
    numel, device = 2**31 + 2 * module.WEIGHTS + 64, torch.device("cpu")
    generator = torch.Generator().manual_seed(1)
    a_slice = -(-numel // module.WEIGHTS)
    codes = torch.empty(3 * numel // 2, dtype=torch.uint8)
    for name, size in (("int4", 32), ("nf4", 64)):
        scales, numbers = torch.empty(3 * numel // size, dtype=torch.bfloat16), module.Numbers("int4", 4, torch.float16)
        nested = None
        if name == "nf4":
            scales = torch.empty(3 * numel // size, dtype=torch.uint8)
            numbers = module.Numbers("nf4", 4, torch.float16, four_bit_code("nf4", device), upper_first=True)
            of_scales = torch.full((3 * -(-numel // size // 256),), 0.25)
            nested = module.Nested(of_scales, torch.tensor([0.1, 0.2, 0.3]), nested_code(device), 256)
        tiles = module.tiling((1, numel), (1, size), 4)
        programs = [a_slice - 1, a_slice, 2 * a_slice, 3 * a_slice - 2, 3 * a_slice - 1]
        wanted, regions = list[torch.Tensor](), list[tuple[int, int]]()
        for program in programs:
            piece, part = divmod(program, a_slice)
            begin = piece * numel + part * module.WEIGHTS
            end = min(begin + module.WEIGHTS, (piece + 1) * numel)
            some = torch.randint(0, 256, ((end - begin) // 2,), dtype=torch.uint8, generator=generator)
            by = torch.randint(0, 256, ((end - begin) // size,), generator=generator).to(scales.dtype)
            codes[begin // 2 : end // 2], scales[begin // size : end // size] = some, by
            small = nested and nested._replace(scales=torch.full((1,), 0.25), means=nested.means[piece : piece + 1])
            shape = (1, 1, end - begin)
            wanted.append(module.decode_matrices(some, by, numbers, tiles, shape, torch.float16, small))
            regions.append((begin, end))
        with patch.object(module, "decode", Chosen(module.decode, programs)):
            found = module.decode_matrices(codes, scales, numbers, tiles, (3, 1, numel), torch.float16, nested)
        for (begin, end), expected in zip(regions, wanted, strict=True):
            assert torch.equal(found.view(-1)[begin:end], expected.view(-1)), (name, begin)
    print("places: interpreted")


PARTS = {"decode": (decode, decoding)}


def controls() -> None:
    """With places of 32 bits the same checks fail, or end by a signal."""
    for name in PARTS:
        done = subprocess.run([sys.executable, "-m", "tests.kernels.places", name], cwd=ROOT, capture_output=True)
        assert done.returncode, f"the checks do not notice places of 32 bits in {name}"
        print(f"places of 32 bits in {name}: exit {done.returncode}")


def _with_32_bits(name: str) -> ModuleType:
    source = Path(PARTS[name][0].__file__ or "").read_text()
    assert "tl.int64" in source
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.py")
        file.write_text(source.replace("tl.int64", "tl.int32"))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        PARTS[name][1](module)
    return module


if __name__ == "__main__":
    _with_32_bits(sys.argv[1])
