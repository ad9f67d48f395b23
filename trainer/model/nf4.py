"""A frozen linear layer in 4 or 8 bits whose packed weight and scales are ordinary ZeRO-3 parameters.

All storage is uint8: DeepSpeed value-casts floating parameters to the engine's dtype, which would destroy packed
nibbles, and it gathers parameters of one dtype in one collective, so a layer costs one all-gather. The arithmetic is
bitsandbytes' (QLoRA, arXiv:2305.14314): blocks of `block_size` weights share one fp32 absmax; with double quantization
the absmax, less its mean over the tensor, is itself stored in 8 bits in blocks of 256. int8 has the same blocks, whose
weights are whole numbers from -127 to 127 of the absmax over 127: bitsandbytes' blockwise quantization by its linear
map.
"""

import math
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.config.training import EXPERTS_AT_ONCE
from trainer.model.held import blockwise
from trainer.model.held.blockwise import (
    NESTED_BLOCK,
    dequantize_absmax,
    four_bit_code,
    nested_code,
)
from trainer.model.kernels import fp8


@dataclass(frozen=True)
class Layout:
    """Sizes of `slices` quantized tensors of `numel` weights each, one after another and each quantized by itself.

    A matrix is one slice, the experts of a layer are one each. A slice's last block may be short, its odd last nibble
    is padded. All sizes but `slice_*` are those of all slices together.
    """

    numel: int
    block_size: int
    slices: int = 1
    weights_a_byte: int = 2

    @property
    def slice_bytes(self) -> int:
        return -(-self.numel // self.weights_a_byte)

    @property
    def slice_blocks(self) -> int:
        return -(-self.numel // self.block_size)

    @property
    def slice_nested_blocks(self) -> int:
        return -(-self.slice_blocks // NESTED_BLOCK)

    @property
    def packed_bytes(self) -> int:
        return self.slices * self.slice_bytes

    @property
    def blocks(self) -> int:
        return self.slices * self.slice_blocks

    @property
    def nested_blocks(self) -> int:
        return self.slices * self.slice_nested_blocks


@dataclass(frozen=True)
class Format:
    """How weights are stored in 4 or 8 bits, and the type that they are multiplied in."""

    quant_type: Literal["nf4", "fp4", "int8"]
    block_size: int
    double: bool
    dtype: torch.dtype

    @property
    def weights_a_byte(self) -> int:
        return 1 if self.quant_type == "int8" else 2

    def quantize(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Packed bytes and fp32 absmax of a flat run of whole blocks."""
        return blockwise.quantize_blocks(weights, self.quant_type, self.block_size)

    def dequantize(self, packed: Tensor, absmax: Tensor, numel: int) -> Tensor:
        """(numel,) in the type of products, of a flat run of blocks."""
        return blockwise.dequantize_blocks(packed, absmax, numel, self.quant_type, self.block_size, self.dtype)


class Packed(nn.Module):
    """Weights in 4 or 8 bits. Parameters, each frozen, uint8, flat and partitioned by ZeRO-3, sizes as in `layout`:

    weight: (packed_bytes,), two weights a byte, or one
    absmax: (4 * blocks,), fp32 scales as bytes; or (blocks,), 8-bit codes, under double quantization
    nested_absmax: (4 * nested_blocks,), only under double quantization
    """

    weight: Tensor
    absmax: nn.Parameter
    nested_absmax: nn.Parameter
    absmax_mean: Tensor
    format: Format
    layout: Layout
    slice_shape: tuple[int, int]

    def _pack(self, shape: tuple[int, int], slices: int, form: Format) -> None:
        self.format, self.slice_shape = form, shape
        self.layout = Layout(math.prod(shape), form.block_size, slices, form.weights_a_byte)
        if form.double:
            # The mean of each slice's absmax, the same on every rank.
            self.absmax_mean = nn.Buffer(torch.zeros(slices, dtype=torch.float32), persistent=False)

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each parameter."""
        layout = self.layout
        if not self.format.double:
            return {"weight": layout.packed_bytes, "absmax": 4 * layout.blocks}
        return {"weight": layout.packed_bytes, "absmax": layout.blocks, "nested_absmax": 4 * layout.nested_blocks}

    def matrices(self, first: int, last: int) -> Tensor:
        """Slices [first, last), (last - first, *slice_shape) in the compute dtype. The parameters must be gathered.

        They are dequantized as one row, as they were quantized: on a CPU, bitsandbytes 0.50 lets every row begin a
        block, which is wrong for rows that are not whole blocks.
        """
        form, layout, count = self.format, self.layout, last - first
        if count > 1 and not self._is_even:
            return torch.cat([self.matrices(index, index + 1) for index in range(first, last)])
        packed = self.weight.data[first * layout.slice_bytes : last * layout.slice_bytes]
        if form.double and form.quant_type == "nf4" and has_one_pass(packed.device.type):
            values = self._in_one_pass(packed, first, last)
        else:
            values = form.dequantize(packed, self._scales(first, last), count * layout.numel)
        return values.view(count, *self.slice_shape)

    def _in_one_pass(self, packed: Tensor, first: int, last: int) -> Tensor:
        """The same without an array of scales, of a double quantized NF4."""
        from trainer.model.kernels.double import dequantize_double

        blocks, nested = self.layout.slice_blocks, self.layout.slice_nested_blocks
        return dequantize_double(
            packed,
            self.absmax.data[first * blocks : last * blocks],
            self.nested_absmax.data.view(torch.float32)[first * nested : last * nested],
            self.absmax_mean[first:last],
            nested_code(packed.device),
            four_bit_code("nf4", packed.device),
            numel=(last - first) * self.layout.numel,
            block_size=self.format.block_size,
            nested_block=NESTED_BLOCK,
            dtype=self.format.dtype,
        )

    @property
    def _is_even(self) -> bool:
        """Whether each slice is whole blocks, of absmax too: then neighbours are dequantized as one."""
        layout = self.layout
        return not (layout.numel % layout.block_size or (self.format.double and layout.slice_blocks % NESTED_BLOCK))

    def _scales(self, first: int, last: int) -> Tensor:
        """fp32 absmax of slices [first, last), (slice_blocks each,)."""
        blocks, nested = self.layout.slice_blocks, self.layout.slice_nested_blocks
        if not self.format.double:
            return self.absmax.data.view(torch.float32)[first * blocks : last * blocks]
        scales = dequantize_absmax(
            self.absmax.data[first * blocks : last * blocks],
            self.nested_absmax.data.view(torch.float32)[first * nested : last * nested],
        )
        return (scales.view(-1, blocks) + self.absmax_mean[first:last, None]).view(-1)


_made: "dict[FrozenLinear4bit, Tensor] | None" = None


@contextmanager
def dequantized_once() -> Iterator[None]:
    """Inside, each linear layer makes its weight once, and it is kept until the end: their parameters must stay
    gathered.
    """
    global _made
    outer, _made = _made, {}
    try:
        yield
    finally:
        _made = outer


class FrozenLinear4bit(Packed, nn.Linear):
    """`y = x W^T + b` with W in 4 bits; x is (..., in_features). `in_fp8` says that it multiplies by
    trainer/model/kernels/fp8.py.
    """

    in_fp8 = False

    def __init__(self, in_features: int, out_features: int, form: Format) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=False, device="meta")
        self._pack((out_features, in_features), 1, form)

    def dequantize(self) -> Tensor:
        """The weight, (out_features, in_features)."""
        if _made is None:
            return self.matrices(0, 1)[0]
        if self not in _made:
            _made[self] = self.matrices(0, 1)[0]
        return _made[self]

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenMatmul.apply(x, self, self.bias)


def multiply(x: Tensor, linear: nn.Linear, bias: Tensor | None) -> Tensor:
    """x (..., in_features) by the layer's frozen weight, and its bias -> (..., out_features). Its parameters must be
    gathered.
    """
    weight = weight_of(linear)
    if bias is None:
        return fp8.product(x, weight) if _is_in_fp8(linear) else nn.functional.linear(x, weight)
    result = fp8.product(x, weight).add_(bias) if _is_in_fp8(linear) else nn.functional.linear(x, weight, bias)
    # torch's sum is a view, and autograd refuses to change a view that comes out of a function of ours in place, as
    # Falcon's code does.
    return torch.ops.aten._unsafe_view(result, result.shape)


def multiply_back(grad: Tensor, linear: nn.Linear, total: Tensor | None = None) -> Tensor:
    """The gradient (..., out_features) by the same weight -> that of the inputs (..., in_features), in `total` where
    that is given, to which it is added.
    """
    weight = weight_of(linear)
    if total is not None and not _is_in_fp8(linear):
        total.flatten(0, -2).addmm_(grad.flatten(0, -2), weight)
        return total
    product = fp8.product(grad, weight.t()) if _is_in_fp8(linear) else grad @ weight
    return product if total is None else total.add_(product.view_as(total))


def _is_in_fp8(linear: nn.Linear) -> bool:
    return isinstance(linear, FrozenLinear4bit) and linear.in_fp8


def multiply_in_fp8(model: nn.Module, device: torch.device) -> tuple[int, int]:
    """Have the model's packed linear layers multiply in FP8, those whose sizes fit; returns how many do, of how many.
    Raises `ConfigError` where the device cannot."""
    fp8.check(device)
    layers = [module for module in model.modules() if isinstance(module, FrozenLinear4bit)]
    for layer in layers:
        layer.in_fp8 = layer.in_features % fp8.MULTIPLE == layer.out_features % fp8.MULTIPLE == 0
    return sum(layer.in_fp8 for layer in layers), len(layers)


def weight_of(linear: nn.Linear) -> Tensor:
    """The weight of a linear layer, (out_features, in_features), in 4 bits or not. Its parameters must be gathered."""
    return linear.dequantize() if isinstance(linear, FrozenLinear4bit) else linear.weight.detach()


class FrozenStack4bit(Packed):
    """Matrices in 4 bits where a mixture of experts has one 3-D parameter, in the experts' module, whose forward pass
    is that of trainer/model/experts.py and makes `at_once` bytes of them at a time. That module must be a leaf to
    ZeRO-3, as nothing calls this one's forward.
    """

    at_once = EXPERTS_AT_ONCE

    def __init__(self, shape: tuple[int, int, int], form: Format) -> None:
        super().__init__()
        self._pack((shape[1], shape[2]), shape[0], form)


class _FrozenMatmul(torch.autograd.Function):
    """Keeps the module, never the gathered weight: a saved view would pin every gathered layer until backward.

    ZeRO-3 gathers the module's parameters again before its backward runs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: FrozenLinear4bit, bias: Tensor | None) -> Tensor:
        ctx.module = module
        return multiply(x, module, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:  # type: ignore[override]
        bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return multiply_back(grad, ctx.module), None, bias


@cache
def has_one_pass(device_type: str) -> bool:
    """Whether double quantized weights are made by the kernel of trainer/model/kernels/double.py: on a GPU, with the
    Triton that PyTorch brings for it, which compiles what launches a kernel on the machine itself
    (triton/runtime/build.py). bitsandbytes' kernels give the same bits."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    return device_type == "cuda" and find_spec("triton") is not None and compiler is not None and headers


def share(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """ZeRO-3's partition: rank r holds elements [r * ceil(n / W), (r + 1) * ceil(n / W)) of the flat tensor, cut at
    n.
    """
    size = math.ceil(numel / world_size)
    return min(numel, rank * size), min(numel, (rank + 1) * size)
