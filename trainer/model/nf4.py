"""A frozen linear layer in 4 bits whose packed weight and scales are ordinary ZeRO-3 parameters.

All storage is uint8: DeepSpeed value-casts floating parameters to the engine's dtype, which would destroy packed
nibbles, and it gathers parameters of one dtype in one collective, so a layer costs one all-gather. The arithmetic is
bitsandbytes' (QLoRA, arXiv:2305.14314): blocks of `block_size` weights share one fp32 absmax; with double quantization
the absmax, less its mean over the tensor, is itself stored in 8 bits in blocks of 256.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

NESTED_BLOCK = 256  # bitsandbytes' block of absmax values under double quantization


@dataclass(frozen=True)
class Layout:
    """Sizes of `slices` quantized tensors of `numel` weights each, one after another and each quantized by itself.

    A matrix is one slice, the experts of a layer are one each. A slice's last block may be short, its odd last nibble is
    padded. All sizes but `slice_*` are those of all slices together.
    """

    numel: int
    block_size: int
    slices: int = 1

    @property
    def slice_bytes(self) -> int:
        return -(-self.numel // 2)

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
    """How weights are stored in 4 bits, and the type that they are multiplied in."""

    quant_type: Literal["nf4", "fp4"]
    block_size: int
    double: bool
    dtype: torch.dtype


class Packed(nn.Module):
    """Weights in 4 bits. Parameters, each frozen, uint8, flat and partitioned by ZeRO-3, sizes as in `layout`:

    weight: (packed_bytes,), two weights a byte
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
        self.layout = Layout(math.prod(shape), form.block_size, slices)
        if form.double:
            # The mean of each slice's absmax, the same on every rank.
            self.absmax_mean = nn.Buffer(torch.zeros(slices, dtype=torch.float32), persistent=False)

    def dequantize(self, index: int = 0) -> Tensor:
        """Slice `index`, of `slice_shape` in the compute dtype. The parameters must be gathered.

        It is dequantized as one row, as it was quantized: on a CPU, bitsandbytes 0.50 lets every row begin a block, which is
        wrong for rows that are not whole blocks.
        """
        form, layout = self.format, self.layout
        packed = self.weight.data[index * layout.slice_bytes : (index + 1) * layout.slice_bytes]
        state = bnb.QuantState(
            absmax=self._scales(index),
            shape=torch.Size([layout.numel]),
            dtype=form.dtype,
            blocksize=form.block_size,
            quant_type=form.quant_type,
        )
        return bnb.dequantize_4bit(packed.view(-1, 1), state).view(self.slice_shape)

    def _scales(self, index: int) -> Tensor:
        """fp32 absmax of one slice, (slice_blocks,)."""
        blocks, nested = self.layout.slice_blocks, self.layout.slice_nested_blocks
        if not self.format.double:
            return self.absmax.data.view(torch.float32)[index * blocks : (index + 1) * blocks]
        state = bnb.QuantState(
            absmax=self.nested_absmax.data.view(torch.float32)[index * nested : (index + 1) * nested],
            code=_nested_code(self.weight.device),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        codes = self.absmax.data[index * blocks : (index + 1) * blocks]
        return bnb.dequantize_blockwise(codes, state) + self.absmax_mean[index]


class FrozenLinear4bit(Packed, nn.Linear):
    """`y = x W^T + b` with W in 4 bits; x is (..., in_features)."""

    def __init__(self, in_features: int, out_features: int, form: Format) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=False, device="meta")
        self._pack((out_features, in_features), 1, form)

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenMatmul.apply(x, self, 0, self.bias, True)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


class FrozenStack4bit(Packed):
    """Matrices in 4 bits where a mixture of experts has one 3-D parameter: `stack[i]` stands for matrix i in a product.

    It takes the parameter's place inside the experts' module, whose own forward multiplies with `stack[i]` by
    `nn.functional.linear` or `@`. That module must be a leaf to ZeRO-3, as nothing calls this one's forward.
    """

    def __init__(self, shape: tuple[int, int, int], form: Format) -> None:
        super().__init__()
        self._pack((shape[1], shape[2]), shape[0], form)

    def __getitem__(self, index: int | Tensor) -> "_Slice":
        return _Slice(self, int(index))


class _Slice:
    """Matrix `index` of a stack, dequantized only inside a product: torch asks `__torch_function__` how to multiply."""

    def __init__(self, stack: FrozenStack4bit, index: int) -> None:
        self.stack, self.index = stack, index

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        x, matrix, *rest = args
        if isinstance(matrix, _Slice) and not rest and not kwargs:
            if function is nn.functional.linear:
                return _FrozenMatmul.apply(x, matrix.stack, matrix.index, None, True)
            if function in (Tensor.matmul, Tensor.__matmul__, torch.matmul):
                return _FrozenMatmul.apply(x, matrix.stack, matrix.index, None, False)
        raise AssertionError(f"the experts' forward calls {function} on a quantized matrix")


class _FrozenMatmul(torch.autograd.Function):
    """Keeps the module, never the gathered weight: a saved view would pin every gathered layer until backward.

    ZeRO-3 gathers the module's parameters again before its backward runs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Packed, index: int, bias: Tensor | None, transposed: bool) -> Tensor:
        """x (..., in) by slice `index`, which is (out, in) where `transposed`, else (in, out)."""
        ctx.module, ctx.index, ctx.transposed = module, index, transposed
        weight = module.dequantize(index)
        return nn.functional.linear(x, weight, bias) if transposed else x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None, None]:  # type: ignore[override]
        weight = ctx.module.dequantize(ctx.index)
        bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return grad @ (weight if ctx.transposed else weight.T), None, None, bias, None


def quantize_blocks(weights: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed bytes (ceil(n / 2),) uint8 and absmax (ceil(n / block_size),) fp32 of a flat run of whole blocks.

    Blocks are independent, so a run that starts at a block's border gives the very bytes of quantizing the whole tensor.
    """
    packed, state = bnb.quantize_4bit(weights, blocksize=block_size, quant_type=quant_type)
    return packed.view(-1), state.absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization of one tensor's whole absmax (blocks,): codes (blocks,) uint8, nested absmax fp32, mean ()."""
    mean = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - mean, blocksize=NESTED_BLOCK)
    return codes, state.absmax, mean


_nested_codes: dict[torch.device, Tensor] = {}


def _nested_code(device: torch.device) -> Tensor:
    """bitsandbytes' 8-bit dynamic map (256,), the same for every tensor."""
    if device not in _nested_codes:
        _nested_codes[device] = bnb.create_dynamic_map().to(device)
    return _nested_codes[device]


def share(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """ZeRO-3's partition: rank r holds elements [r * ceil(n / W), (r + 1) * ceil(n / W)) of the flat tensor, cut at n."""
    size = math.ceil(numel / world_size)
    return min(numel, rank * size), min(numel, (rank + 1) * size)
