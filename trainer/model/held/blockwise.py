"""bitsandbytes' arithmetic over blocks of numbers, which share a scale (absmax): 4 bits and 8 bits. Every call of it in
training is here.

Its CUDA kernels take the number of elements as a C int (bitsandbytes/backends/cuda/ops.py), and round it up to what a
program does. From 2**31 elements on a call ends the process, or leaves a part of its result as it was in memory without
an error (bitsandbytes#1785, #2067). Blocks are independent, so a longer run is cut between two blocks here, and gives
the same bits.
"""

from collections.abc import Callable, Iterator
from functools import cache

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

AT_ONCE = 2**30
"""The most numbers that a call gets; a multiple of every block size."""
NESTED_BLOCK = 256
"""bitsandbytes' block of scales under double quantization."""


def quantize_blocks(weights: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed bytes uint8, two weights a byte or in int8 one, and absmax (ceil(n / block_size),) fp32 of a flat run of
    whole blocks.

    Blocks are independent, so a run that starts at a block's border gives the very bytes of quantizing the whole
    tensor.
    """
    if quant_type == "int8":
        return quantize_by(int8_code(weights.device), weights, block_size)
    packed, scales = list[Tensor](), list[Tensor]()
    for begin, end in _runs(weights.numel()):
        codes, state = bnb.quantize_4bit(weights[begin:end], blocksize=block_size, quant_type=quant_type)
        packed.append(codes.view(-1))
        scales.append(state.absmax)
    return _joined(packed), _joined(scales)


def dequantize_blocks(
    packed: Tensor, absmax: Tensor, numel: int, quant_type: str, block_size: int, dtype: torch.dtype
) -> Tensor:
    """(numel,) in `dtype`, of a flat run of blocks."""
    if quant_type == "int8":
        return dequantize_by(int8_code(packed.device), packed, absmax, block_size, dtype)

    def decode(begin: int, end: int, out: Tensor | None) -> Tensor:
        scales = absmax[begin // block_size : -(-end // block_size)]
        shape = torch.Size([end - begin])
        state = bnb.QuantState(scales, shape=shape, dtype=dtype, blocksize=block_size, quant_type=quant_type)
        return bnb.dequantize_4bit(packed[begin // 2 : -(-end // 2)].view(-1, 1), state, out=out).view(-1)

    return _decoded(decode, numel, dtype, packed.device)


def quantize_by(code: Tensor, values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Bytes (n,) and scales (ceil(n / block_size),) fp32 of flat values, where a byte stands for its number in `code`
    (256,).
    """
    found, scales = list[Tensor](), list[Tensor]()
    for begin, end in _runs(values.numel()):
        codes, state = bnb.quantize_blockwise(values[begin:end], code=code, blocksize=block_size)
        found.append(codes)
        scales.append(state.absmax)
    return _joined(found), _joined(scales)


def dequantize_by(
    code: Tensor, codes: Tensor, scales: Tensor, block_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(n,) in `dtype`: the inverse of `quantize_by`."""

    def decode(begin: int, end: int, out: Tensor | None) -> Tensor:
        of_run = scales[begin // block_size : -(-end // block_size)]
        state = bnb.QuantState(of_run, code=code, blocksize=block_size, dtype=dtype)
        return bnb.dequantize_blockwise(codes[begin:end], state, out=out)

    return _decoded(decode, codes.numel(), dtype, codes.device)


def _runs(numel: int) -> Iterator[tuple[int, int]]:
    """[0, numel) in runs that a call can take."""
    for begin in range(0, max(numel, 1), AT_ONCE):
        yield begin, min(numel, begin + AT_ONCE)


def _decoded(
    decode: Callable[[int, int, Tensor | None], Tensor], numel: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if numel <= AT_ONCE:
        return decode(0, numel, None)
    values = torch.empty(numel, dtype=dtype, device=device)
    for begin, end in _runs(numel):
        run = values[begin:end]
        if device.type == "cuda":
            decode(begin, end, run)
        else:  # where bitsandbytes writes to no tensor that is given
            run.copy_(decode(begin, end, None))
    return values


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor) -> Tensor:
    """fp32 absmax less its mean, (blocks,), of whole blocks of codes."""
    return dequantize_by(nested_code(codes.device), codes, nested_absmax, NESTED_BLOCK)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization of one tensor's whole absmax (blocks,): codes (blocks,) uint8, nested absmax fp32, mean
    ().
    """
    mean = absmax.mean()
    codes, nested = quantize_by(nested_code(absmax.device), absmax - mean, NESTED_BLOCK)
    return codes, nested, mean


@cache
def dynamic_code(signed: bool, device: torch.device) -> Tensor:
    """bitsandbytes' 8-bit dynamic map (256,) fp32 (arXiv:2110.02861), of numbers from -1 to 1, or from 0."""
    return bnb.create_dynamic_map(signed=signed).to(device)


def nested_code(device: torch.device) -> Tensor:
    """The map of scales under double quantization, the same for every tensor."""
    return dynamic_code(True, device)


@cache
def four_bit_code(quant_type: str, device: torch.device) -> Tensor:
    """The values of the 16 nibbles of nf4 or fp4, fp32."""
    return bnb.get_4bit_type(quant_type, device=device)


@cache
def int8_code(device: torch.device) -> Tensor:
    """The values of 8-bit codes, fp32: steps of 1/127."""
    return bnb.create_linear_map(signed=True, total_bits=8).to(device)
