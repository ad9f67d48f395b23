"""What a GPU would run of a kernel, compiled without a device, as the machine code says."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

CAPABILITIES = (80, 90, 100)
_TOOLS = Path(triton.__file__ or "").parent / "backends/nvidia/bin"
_PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")
_TYPES: dict[Any, str] = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8"} | {
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Code(NamedTuple):
    """`spills` are instructions that move registers to memory and back. `loads` and `stores` count instructions by their
    width, such as 2 LDG.128, and `products` those of tensor cores. `instructions` are those of a warp; `shared` is in bytes."""

    registers: int
    spills: int
    loads: str
    stores: str
    products: str
    instructions: int
    shared: int
    ptx: str


def compiled(kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], capability: int, **options: Any) -> Any:
    """The kernel as a launch with these arguments compiles it: types stand for tensors, which begin at a multiple of 16
    bytes, numbers are specialised as Triton does it."""
    signature, attributes, fixed = dict[str, str](), dict[Any, Any](), dict(constants)
    for place, name in enumerate(kernel.arg_names):
        value = arguments.get(name)
        if name in constants or value == 1:
            signature[name], fixed[name] = "constexpr", constants.get(name, 1)
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
        else:
            signature[name] = _TYPES[value]
        if signature[name] != "constexpr" and (not isinstance(value, int) or value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def read(binary: Any) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(binary.asm["cubin"])
        usage, text = _run("cuobjdump", "-res-usage", file), _run("cuobjdump", "-sass", file)
    kinds = [_kind(name) for name in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)]
    while kinds[-1:] in (["NOP"], ["BRA"]):  # behind the end
        kinds.pop()
    counts = Counter(kinds)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers
    spills = sum(count for kind, count in counts.items() if kind.split(".")[0] in ("LDL", "STL"))
    loads, stores, products = (_some(counts, *names) for names in (("LDG", "LDGSTS"), ("STG",), _PRODUCTS))
    return Code(
        int(registers[1]), spills, loads, stores, products, len(kinds), binary.metadata.shared, binary.asm["ptx"]
    )


def _run(tool: str, *arguments: Any) -> str:
    command = [_TOOLS / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _kind(name: str) -> str:
    """An instruction with its width alone: LDG.E.128.CONSTANT -> LDG.128."""
    parts = name.split(".")
    moves = parts[0] in ("LDG", "STG", "LDGSTS")
    return ".".join([parts[0], *(part for part in parts if moves and part in ("U8", "U16", "64", "128"))])


def _some(counts: Counter[str], *names: str) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if kind.split(".")[0] in names)
