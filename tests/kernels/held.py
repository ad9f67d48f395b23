"""Modules that hold random codes in every format that has a kernel."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.model.held import HeldFormat
from trainer.model.held.codes import Code, KeptWeight, Numbers, Seconds
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.formats.stored import KeptCodes
from trainer.model.held.layers import HeldStack

WHOLE = 0  # a tile's size: as large as the matrix


@dataclass(frozen=True)
class Format:
    """`tile` and `scales` are as in `KeptWeight`; a format of bitsandbytes has a block instead."""

    name: str
    numbers: str
    tile: tuple[int, int] = (1, 1)
    scales: str = "BF16"
    transposed: bool = False
    double: bool = False
    seconds: Seconds = "none"
    zeros: bool = False

    @property
    def of_blocks(self) -> bool:
        return self.numbers in ("nf4", "fp4", "nf8")

    def form(self, shape: tuple[int, int, int], rounded: str) -> HeldFormat:
        """The format of a stack, whose stored values have the type `rounded`."""
        if self.of_blocks:
            return Blocks({"nf8": "int8"}.get(self.numbers, self.numbers), self.tile[1], self.double)
        stored = (shape[2], shape[1]) if self.transposed else shape[1:]
        down, across = (side or size for side, size in zip(self.tile, stored, strict=True))
        code = Code(cast(Numbers, self.numbers), (down, across))
        return KeptCodes(KeptWeight(code, self.scales, rounded, self.transposed, self.seconds, self.zeros))


FORMATS = {
    one.name: one
    for one in (
        Format("int4, groups of 32", "int4", (1, 32)),
        Format("int4, groups of 128, fp16 scales", "int4", (1, 128), "F16"),
        Format("int4, rows", "int4", (1, WHOLE)),
        Format("int4 with zeros, groups of 32", "int4", (1, 32), zeros=True),
        Format("int4 with zeros, rows", "int4", (1, WHOLE), "F16", zeros=True),
        Format("mxfp4", "e2m1", (1, 32), "F8_E8M0", transposed=True),
        Format("mxfp4, rows", "e2m1", (1, 32), "U8"),
        Format("fp4, groups of 16 with e4m3", "e2m1", (1, 16), "F8_E4M3"),
        Format("nvfp4, multiplied", "e2m1", (1, 16), "F8_E4M3", seconds="times"),
        Format("nvfp4, divided", "e2m1", (1, 16), "F8_E4M3", seconds="over"),
        Format("fp8, tiles", "e4m3", (128, 128), "F32"),
        Format("fp8, tiles with powers of two", "e4m3", (128, 128), "F8_E8M0"),
        Format("fp8, rows", "e4m3", (1, WHOLE), "F32"),
        Format("fp8, whole", "e4m3", (WHOLE, WHOLE), "F32"),
        Format("int8, rows", "int8", (1, WHOLE), "F32"),
        Format("int8 from -128 up, groups of 128", "offset8", (1, 128)),
        Format("int8 from -128 up with zeros, groups of 96", "offset8", (1, 96), zeros=True),
        Format("nf4", "nf4", (1, 64)),
        Format("nf4, double", "nf4", (1, 64), double=True),
        Format("fp4", "fp4", (1, 64)),
        Format("fp4, double", "fp4", (1, 128), double=True),
        Format("int8, blocks", "nf8", (1, 64)),
    )
}


def stack_of(form: HeldFormat, shape: tuple[int, int, int], dtype: torch.dtype) -> HeldStack:
    """Every byte is as likely as any other, so that codes are all there; scales are numbers of some size."""
    stack, generator = HeldStack(shape, form, dtype), torch.Generator().manual_seed(sum(shape))
    for name, size in stack.sizes.items():
        codes = 16 if name == "zeros" and form_bits(form) == 4 else 256
        made = torch.randint(0, codes, (size,), generator=generator, dtype=torch.uint8)
        kind = _type_of(form, name)
        if kind is not None:
            made = _scales(size // kind.itemsize, kind, generator)
        setattr(stack, name, nn.Parameter(made, requires_grad=False))
    if form.means:
        stack.absmax_mean = nn.Buffer(torch.rand(shape[0], generator=generator), persistent=False)
    return stack


def form_bits(form: HeldFormat) -> int:
    return form.kept.code.bits if isinstance(form, KeptCodes) else 8


def _type_of(form: HeldFormat, name: str) -> torch.dtype | None:
    """The type of a parameter of scales; None where any byte is one."""
    if isinstance(form, KeptCodes):
        types: dict[str, Any] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        return {"scales": types.get(form.kept.scales, torch.uint8), "seconds": torch.float32}.get(name)
    double = isinstance(form, Blocks) and form.double
    return torch.float32 if name == ("nested_absmax" if double else "absmax") else None


def _scales(count: int, kind: torch.dtype, generator: torch.Generator) -> Tensor:
    if kind == torch.uint8:  # powers of two or e4m3: all but those that are no number, which no product compares
        made = torch.randint(0, 127, (count,), generator=generator, dtype=torch.uint8)
        made[: min(count, 2)] = torch.tensor([0, 120], dtype=torch.uint8)[: min(count, 2)]
        return made
    return ((torch.rand(count, generator=generator) + 0.5) * 0.1).to(kind).view(torch.uint8)
