"""Double quantized NF4 weights in 16 bits in one pass over them, by a Triton kernel for GPUs.

bitsandbytes makes the scales of all blocks first, in two kernels and two arrays of fp32, and then the weights. Here
each block of weights makes its own scale. The operations are the same in the same order, in fp32 and without a fused
one, and so are the bits:

    weight = round(table[nibble] * (code[q] * nested[block // 256] + mean))
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  # PyTorch's builds for CUDA bring it
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

_BLOCKS = 16  # blocks of weights that a program makes


@triton.jit
def dequantize(
    packed, codes, nested, means, code, table, values, numel, blocks, slice_blocks,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A program: `COUNT` blocks of `BLOCK` weights each, of which a byte has two, the first one in its upper half."""
    block = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    there = block < blocks
    scale = tl.load(code + tl.load(codes + block, there, other=0).to(tl.int32))
    scale = scale * tl.load(nested + block // NESTED, there, other=0.0)
    scale = (scale + tl.load(means + block // slice_blocks, there, other=0.0))[:, None]
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    pair = tl.load(packed + byte, byte * 2 < numel, other=0).to(tl.int32)
    first, second = tl.load(table + (pair >> 4)) * scale, tl.load(table + (pair & 15)) * scale
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(values + place, tl.interleave(first, second).to(values.dtype.element_ty), place < numel)


def dequantize_double(
    packed: Tensor,
    codes: Tensor,
    nested: Tensor,
    means: Tensor,
    code: Tensor,
    table: Tensor,
    *,
    numel: int,
    block_size: int,
    nested_block: int,
    dtype: torch.dtype,
) -> Tensor:
    """(numel,) in `dtype`, of slices that are quantized each by itself, one behind the other.

    packed (ceil(numel / 2),) uint8; codes (blocks,) uint8, of scales less their mean; nested (nested blocks,) fp32;
    means (slices,) fp32; code (256,) and table (16,) fp32, the values that a code and a nibble stand for.
    """
    values = torch.empty(numel, dtype=dtype, device=packed.device)
    blocks = len(codes)
    kernel: Any = dequantize
    kernel[(triton.cdiv(blocks, _BLOCKS),)](
        packed, codes, nested, means, code, table, values, numel, blocks, blocks // len(means),
        BLOCK=block_size, NESTED=nested_block, COUNT=_BLOCKS, enable_fp_fusion=False,
    )  # fmt: skip
    return values
