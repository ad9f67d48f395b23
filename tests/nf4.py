"""Weights in 4 and 8 bits decoded by table in plain torch: an independent reference, as on a CPU bitsandbytes 0.50
misreads matrices whose rows are not whole blocks."""

from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldStack


def decoded(packed: Tensor, state: bnb.QuantState) -> Tensor:
    """The weights that bitsandbytes packed: each the table's value times its block's absmax, in the type that they
    had.
    """
    assert state.shape is not None
    assert state.code is not None
    absmax = state.absmax
    if state.nested:
        assert state.offset is not None
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    pairs = packed.view(-1).view(torch.uint8)
    halves = torch.stack([pairs >> 4, pairs & 15], dim=1).view(-1)
    numbers = (halves if len(state.code) == 16 else pairs)[: state.shape.numel()].int()
    scales = absmax.repeat_interleave(state.blocksize)[: len(numbers)]
    return (state.code[numbers] * scales).to(state.dtype).view(state.shape)


def dequantized(weight: Tensor, quant_type: str = "nf4", block_size: int = 64, double: bool = False) -> Tensor:
    """`weight` as it is after bitsandbytes has quantized it, in its own type."""
    return decoded(*quantized(weight, quant_type, block_size, double))


def quantized(
    weight: Tensor, quant_type: str, block_size: int = 64, double: bool = False
) -> tuple[Tensor, bnb.QuantState]:
    """What bitsandbytes makes of `weight`: its codes, and what decodes them."""
    if quant_type == "int8":
        packed, state = bnb.quantize_blockwise(weight.flatten(), code=bnb.create_linear_map(), blocksize=block_size)
        state.shape, state.dtype = weight.shape, weight.dtype
        return packed, state
    return bnb.quantize_4bit(weight, blocksize=block_size, quant_type=quant_type, compress_statistics=double)


def decode_layers(model: nn.Module) -> None:
    """Give the 4-bit layers of a model, as transformers loads it, ordinary weights instead."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            plain: Any = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            weight: Any = module.weight
            plain.weight = nn.Parameter(decoded(weight.data, weight.quant_state), requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(path, plain)


def packed_stack(source: Tensor, double: bool = False) -> tuple[HeldStack, Tensor]:
    """A stack of matrices (n, rows, columns) as bitsandbytes packs each, and the weights that it then holds."""
    stack = HeldStack((len(source), source.shape[1], source.shape[2]), Blocks("nf4", 64, double), source.dtype)
    whole, parts = torch.empty_like(source), list[list[Tensor]]()
    for index, matrix in enumerate(source):
        code, state = bnb.quantize_4bit(matrix, quant_type="nf4", compress_statistics=double)
        whole[index] = decoded(code, state)
        parts.append([code.view(-1), state.absmax.view(torch.uint8)])
        if double:
            assert state.state2 is not None
            assert state.offset is not None
            parts[-1] += [state.state2.absmax.view(torch.uint8), state.offset[None]]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    for name, values in zip(("weight", "absmax", "nested_absmax"), columns, strict=False):
        setattr(stack, name, nn.Parameter(values, requires_grad=False))
    if double:
        stack.absmax_mean = nn.Buffer(columns[3], persistent=False)
    return stack, whole
