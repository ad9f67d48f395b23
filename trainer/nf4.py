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
    """Sizes of one quantized tensor. `numel` weights; the last block may be short, an odd last nibble is padded."""

    numel: int
    block_size: int

    @property
    def packed_bytes(self) -> int:
        return -(-self.numel // 2)

    @property
    def blocks(self) -> int:
        return -(-self.numel // self.block_size)

    @property
    def nested_blocks(self) -> int:
        return -(-self.blocks // NESTED_BLOCK)


class FrozenLinear4bit(nn.Linear):
    """`y = x W^T + b` with W in 4 bits; x is (..., in_features).

    Parameters, each frozen, uint8, flat and partitioned by ZeRO-3:
        weight: (ceil(numel / 2),), two weights a byte
        absmax: (4 * blocks,), fp32 scales as bytes; or (blocks,), 8-bit codes, under double quantization
        nested_absmax: (4 * nested_blocks,), only under double quantization
    """

    absmax: nn.Parameter
    nested_absmax: nn.Parameter
    absmax_mean: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        quant_type: Literal["nf4", "fp4"],
        block_size: int,
        double: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.quant_type, self.block_size, self.nested, self.dtype = quant_type, block_size, double, dtype
        self.layout = Layout(in_features * out_features, block_size)
        if double:
            # The mean of absmax: one number, the same on every rank.
            self.absmax_mean = nn.Buffer(torch.zeros((), dtype=torch.float32), persistent=False)

    def dequantize(self) -> Tensor:
        """W, (out_features, in_features) in the compute dtype. The parameters must be gathered."""
        absmax = self._dequantize_absmax() if self.nested else self.absmax.data.view(torch.float32)
        state = bnb.QuantState(
            absmax=absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.dtype,
            blocksize=self.block_size,
            quant_type=self.quant_type,
        )
        return bnb.dequantize_4bit(self.weight.data.view(-1, 1), state)

    def _dequantize_absmax(self) -> Tensor:
        state = bnb.QuantState(
            absmax=self.nested_absmax.data.view(torch.float32),
            code=_nested_code(self.weight.device),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        return bnb.dequantize_blockwise(self.absmax.data, state) + self.absmax_mean

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenMatmul.apply(x, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quant_type}, block_size={self.block_size}, double={self.nested}"


class _FrozenMatmul(torch.autograd.Function):
    """Keeps the module, never the gathered weight: a saved view would pin every gathered layer until backward.

    ZeRO-3 gathers the module's parameters again before its backward runs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: FrozenLinear4bit) -> Tensor:
        ctx.module = module
        return nn.functional.linear(x, module.dequantize(), module.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.module.dequantize(), None


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
