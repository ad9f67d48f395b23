"""Machine code of every kernel for GPUs of three generations, made without one and held to a table.

    python -m tests.kernels [NAME ...]       exit 1 where a kernel is worse than the table says
    python -m tests.kernels --write          make the table anew (tests/kernels/code.json)

A row is a kernel as a launch of a real model's sizes compiles it. Registers and instructions may be a tenth more than
the table has, because releases of Triton differ; nothing spills, and no load or store gets narrower.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.kernels.code import CAPABILITIES, Code, compiled, read
from tests.kernels.held import FORMATS
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.formats.stored import KeptCodes
from trainer.model.kernels import decode, mixture, move, multiply

TABLE = Path(__file__).with_name("code.json")
SHAPE = (384, 4096, 7168)  # gate and up of a layer of Kimi K2
_MORE = 1.1
_SHARED = 99 * 2**10  # that a program has on GPUs of compute capability 8.6, 8.9 and 12


class Row(NamedTuple):
    """`units` are what the instructions of a warp make for each of its threads: weights or values."""

    name: str
    capability: int
    code: Code
    units: float

    @property
    def instructions(self) -> float:
        """For each weight or value."""
        return round(self.code.instructions / self.units, 1)

    def shown(self) -> dict[str, Any]:
        """What the table keeps."""
        code = self.code
        kept = {"registers": code.registers, "instructions": self.instructions, "loads": code.loads}
        return {**kept, "stores": code.stores, **({"products": code.products} if code.products else {})}

    def faults(self, known: dict[str, Any]) -> Iterator[str]:
        if self.code.spills:
            yield f"{self.code.spills} instructions spill registers"
        if self.code.shared > _SHARED:
            yield f"{self.code.shared} bytes of shared memory"
        for what in ("registers", "instructions"):
            if self.shown()[what] > _MORE * known[what]:
                yield f"{self.shown()[what]} {what}, {known[what]} in the table"
        for what in ("loads", "stores"):
            if _widest(self.shown()[what]) < _widest(known[what]):
                yield f"{what} are {self.shown()[what]}, {known[what]} in the table"
        if known.get("products", "").split()[1:] != self.code.products.split()[1:]:
            yield f"tensor cores: {self.code.products or 'none'}, {known.get('products')} in the table"
        if "fma.rn.f32" in self.code.ptx and not self.name.startswith(_FUSES):
            yield "a fused operation, which rounds once where PyTorch rounds twice"


def _widest(moves: str) -> int:
    """The bits of the widest of such moves as 2 LDG.128, 1 LDG.U16."""
    widths = (move.rpartition(".")[2] for move in moves.split(", "))
    return max({"U8": 8, "U16": 16}.get(width, int(width) if width.isdigit() else 32) for width in widths)


def decoding(name: str, *, even: bool) -> tuple[Any, dict[str, Any], dict[str, Any], float]:
    """The kernel that decodes a format, its arguments and constants, and the weights of a thread."""
    held, numel, nested, table = FORMATS[name].form(SHAPE, "BF16"), SHAPE[1] * SHAPE[2], None, None
    beside = decode.Beside()
    if isinstance(held, Blocks):
        bits, stored, tile = 8 // held.weights_a_byte, (1, numel), (1, held.block_size)
        scales, count, table = torch.float32, held.blocks(numel), torch.empty(0)
        if held.double:
            nested, scales = decode.Nested(table, table, table, 256), torch.uint8
    else:
        assert isinstance(held, KeptCodes)
        kept = held.kept
        bits, stored, tile = kept.code.bits, ((SHAPE[2], SHAPE[1]) if kept.transposed else SHAPE[1:]), kept.code.tile
        down, across = kept.code.tiles(*stored)
        scales, count = held.scales_type, down * across
        one = torch.empty(0)
        beside = decode.Beside(kept.seconds, one if kept.seconds != "none" else None, one if kept.zeros else None)
    tiles = decode.tiling(stored, tile, bits)
    assert tiles is not None
    numbers = decode.Numbers(FORMATS[name].numbers, bits, torch.bfloat16, table, table is not None)
    of_scales = torch.uint8 if scales.itemsize == 1 else torch.bfloat16 if scales.itemsize == 2 else scales
    arguments = {
        "codes": torch.uint8,
        "scales": of_scales,
        "values": torch.bfloat16,
        "seconds": torch.float32 if beside.seconds is not None else torch.uint8,
        "zeros": torch.uint8,
        **dict.fromkeys(("nested", "means", "nested_table"), torch.float32 if nested else torch.uint8),
        "table": torch.uint8 if table is None else torch.float32,
        "numel": numel,
        "slice_bytes": numel * bits // 8,
        "slice_scales": count,
        "slice_rows": stored[0],
        "slice_nested": count // 256 if nested else 0,
        "programs": numel // decode.WEIGHTS,
        **tiles._asdict(),
    }
    constants = decode.constants(numbers, tiles, numel, scales, nested, beside) | {"EVEN": even}
    return decode.decode, arguments, constants, decode.WEIGHTS / 128


def moving(name: str, *, even: bool) -> tuple[Any, dict[str, Any], dict[str, Any], float]:
    """The kernel that moves the codes of a format, for a portion of rows of a matrix."""
    held = FORMATS[name].form(SHAPE, "BF16")
    assert isinstance(held, KeptCodes)
    kept, stored = held.kept, (1152, 7168)
    tiles = move.tiling(stored, kept.code.tile, kept.code.bits)
    assert tiles is not None
    _, arguments, _, _ = decoding(name, even=even)
    down, across = kept.code.tiles(*stored)
    arguments |= dict.fromkeys(("down", "across"), torch.int32) | tiles._asdict()
    numel = stored[0] * stored[1]
    arguments |= {"change": torch.float32, "numel": numel, "slice_bytes": numel * kept.code.bits // 8}
    arguments |= {"slice_scales": down * across, "slice_rows": stored[0], "slice_down": 0, "slice_across": 0}
    arguments["programs"] = numel // move.WEIGHTS
    beside = decode.Beside(kept.seconds, *(torch.empty(0) if there else None for there in (kept.seconds, kept.zeros)))
    numbers = decode.Numbers(kept.code.numbers, kept.code.bits, torch.bfloat16)
    constants = move.constants(numbers, tiles, numel, held.scales_type, beside) | {"EVEN": even}
    return move.move, arguments, constants, move.WEIGHTS / 128


def elementwise(kernel: Any, **arguments: Any) -> tuple[Any, dict[str, Any], dict[str, Any], float]:
    """A kernel of a mixture's rows, and the values of a thread in a portion of columns."""
    known = {"COLUMNS": 1024, "EACH": 8}
    return kernel, arguments, {name: known[name] for name in kernel.arg_names if name in known}, 1024 / 128


def product(*, transposed: bool) -> tuple[Any, dict[str, Any], dict[str, Any], float]:
    """Rows by the experts' matrices (inputs, outputs), or by their transposes; the products of a thread in a tile."""
    inputs, outputs = (1536, 4096) if transposed else (4096, 3072)
    strides = (1, inputs) if transposed else (outputs, 1)
    arguments: dict[str, Any] = {
        **dict.fromkeys(("rows", "matrices", "result"), torch.bfloat16),
        **dict.fromkeys(("tile_group", "tile_begin", "tile_end"), torch.int32),
        "across": outputs // multiply.WIDE,
        "inputs": inputs,
        "outputs": outputs,
        "of_group": inputs * outputs,
        "of_input": strides[0],
        "of_output": strides[1],
    }
    constants = {"ROWS": multiply.ROWS, "WIDE": multiply.WIDE, "INNER": multiply.INNER, "EVEN": True}
    return multiply.multiply_by_matrices, arguments, constants, multiply.ROWS * multiply.WIDE / 256


def product_with_others() -> tuple[Any, dict[str, Any], dict[str, Any], float]:
    """The gradient of the experts' adapters, of rank 16."""
    arguments: dict[str, Any] = dict.fromkeys(("left", "right", "result"), torch.bfloat16)
    arguments |= {"offsets": torch.int32, "tall": 16, "wide": 4096}
    constants = {"ROWS": multiply.ROWS, "WIDE": multiply.WIDE, "INNER": multiply.INNER}
    return multiply.multiply_with_others, arguments, constants, multiply.ROWS * multiply.WIDE / 256


_ROWS: dict[str, Any] = {"both": torch.bfloat16, "weights": torch.float32, "result": torch.bfloat16, "inner": 1536}
_BACK = {"grads": torch.bfloat16, "of_both": torch.bfloat16, "of_weights": torch.float32}
_TOKENS: dict[str, Any] = {"rows": torch.bfloat16, "places": torch.int64, "result": torch.bfloat16, "width": 4096}

_MASKED = ("int4, groups of 32", "nf4, double", "fp8, tiles")
KERNELS: dict[str, Callable[[], tuple[Any, dict[str, Any], dict[str, Any], float]]] = {
    **{f"decode {name}": lambda name=name: decoding(name, even=True) for name in FORMATS},
    **{f"decode {name}, with masks": lambda name=name: decoding(name, even=False) for name in _MASKED},
    **{
        f"move {name}": lambda name=name: moving(name, even=True)
        for name, form in FORMATS.items()
        if not form.of_blocks
    },
    **{
        f"move {name}, with masks": lambda name=name: moving(name, even=False)
        for name in _MASKED
        if name != "nf4, double"
    },
    "gate": lambda: elementwise(mixture.gate_rows, **_ROWS),
    "gate, backward": lambda: elementwise(mixture.gate_rows_back, **_ROWS, **_BACK),
    "combine 8 rows": lambda: elementwise(mixture.combine_rows, **_TOKENS),
    "product by matrices": lambda: product(transposed=False),
    "product by transposes": lambda: product(transposed=True),
    "product with others": product_with_others,
}
_FUSES = ("gate", "combine", "product")
"""Beginnings of the names of kernels that are held to no other program's bits."""


def rows(names: list[str]) -> Iterator[Row]:
    for name in names or KERNELS:
        kernel, arguments, constants, units = KERNELS[name]()
        # PyTorch multiplies groups itself on 9.0 and 10.0.
        for capability in (80, 86, 120) if name.startswith("product") else CAPABILITIES:
            options = multiply.OPTIONS if name.startswith("product") else {}
            fuses = name.startswith(_FUSES)
            binary = compiled(kernel, arguments, constants, capability, enable_fp_fusion=fuses, **options)
            yield Row(name, capability, read(binary), units)


def main(names: list[str]) -> int:
    writes, wrong, table = "--write" in names, 0, dict[str, Any]()
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    names = [name for name in names if name != "--write"]
    for row in rows(names):
        table.setdefault(row.name, {})[f"sm_{row.capability}"] = row.shown()
        code = row.code
        said = f"{code.registers} registers, {code.spills} spills, {row.instructions} instructions each"
        print(
            f"{row.name}, sm_{row.capability}: {said}; {code.loads}; {code.stores}{code.products and '; '}{code.products}"
        )
        faults = [] if writes else list(row.faults(known[row.name][f"sm_{row.capability}"]))
        wrong += bool(faults)
        for fault in faults:
            print(f"  WRONG: {fault}", flush=True)
    if writes:
        text = json.dumps(known | table, indent=1)
        TABLE.write_text(text + "\n")
    print(f"{sum(map(len, table.values()))} kernels, {wrong} worse than the table")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
