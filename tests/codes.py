"""Weights as other programs store them in 4 and 8 bits, and the values that these stand for by each format's
specification, in plain
torch: no code of the product decodes here.

A maker returns the tensors that the files have for the weight of the module `path`, and its values. Codes and scales
are random.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Made = tuple[dict[str, Tensor], Tensor]
Maker = Callable[[str, int, int], Made]

# OCP Microscaling specification 1.0, table 5: the values of E2M1.
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def packed(codes: Tensor, bits: int, along: int) -> Tensor:
    """Codes as int32, the first in the lowest bits, along an axis that is filled up with zeros."""
    each, moved = 32 // bits, codes.movedim(along, -1).long()
    moved = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % each))
    words = (moved.unflatten(-1, (-1, each)) << torch.arange(0, 32, bits)).sum(-1)
    return words.to(torch.int64).where(words < 2**31, words - 2**32).int().movedim(-1, along).contiguous()


def halves(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two a byte along the last axis, the first in the lower half."""
    return codes[..., ::2].byte() | (codes[..., 1::2].byte() << 4)


def some_scales(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.rand(shape) + 0.5).mul(0.01).to(dtype)


def integers(
    bits: int, group: int | None, dtype: torch.dtype = torch.bfloat16, *, zeros: bool = False, order: bool = False
) -> Maker:
    """compressed-tensors' pack-quantized: (code - zero) * scale, in the type of the scales; the codes count from the
    least number up.
    """

    def make(path: str, rows: int, columns: int) -> Made:
        codes = torch.randint(0, 2**bits, (rows, columns))
        size = group or columns
        scales = some_scales(rows, columns // size, dtype=dtype)
        zero = torch.randint(0, 2**bits, scales.shape) if zeros else torch.full(scales.shape, 2 ** (bits - 1))
        of = torch.arange(columns) // size
        of = of[torch.randperm(columns)] if order else of
        values = (codes - zero[:, of]).to(dtype) * scales[:, of]
        files = {
            "weight_packed": packed(codes, bits, 1),
            "weight_scale": scales,
            "weight_shape": torch.tensor([rows, columns]),
            **({"weight_zero_point": packed(zero, bits, 0)} if zeros else {}),
            **({"weight_g_idx": of.int()} if order else {}),
        }
        return {f"{path}.{name}": tensor for name, tensor in files.items()}, values

    return make


def fp8_rows(dtype: torch.dtype, *, whole: bool = False) -> Maker:
    """compressed-tensors' float-quantized: a number of float8_e4m3 times the scale of its row, or of the matrix."""

    def make(path: str, rows: int, columns: int) -> Made:
        weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
        scales = some_scales(1) if whole else some_scales(rows, 1)
        scales = scales.to(dtype)
        return {f"{path}.weight": weight, f"{path}.weight_scale": scales}, weight.to(dtype) * scales

    return make


def int8_rows(path: str, rows: int, columns: int) -> Made:
    """compressed-tensors' int-quantized."""
    weight, scales = torch.randint(-128, 128, (rows, columns)).to(torch.int8), some_scales(rows, 1)
    return {f"{path}.weight": weight, f"{path}.weight_scale": scales}, weight.bfloat16() * scales


def int8_rows_zeros(path: str, rows: int, columns: int) -> Made:
    """The same with a number for zero in each row."""
    weight, scales = torch.randint(-128, 128, (rows, columns)).to(torch.int8), some_scales(rows, 1)
    zeros = torch.randint(-128, 128, (rows, 1)).to(torch.int8)
    files = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
    return {f"{path}.{name}": tensor for name, tensor in files.items()}, (weight.int() - zeros).bfloat16() * scales


def nvfp4(path: str, rows: int, columns: int) -> Made:
    """compressed-tensors' nvfp4-pack-quantized: E2M1 times a scale in E4M3 for 16 columns, which one of fp32
    divides.
    """
    codes = torch.randint(0, 16, (rows, columns))
    scales, whole = (torch.rand(rows, columns // 16) * 400).to(torch.float8_e4m3fn), torch.tensor([371.3])
    values = (FP4[codes] * (scales.float() / whole).repeat_interleave(16, 1)).bfloat16()
    files = {"weight_packed": halves(codes), "weight_scale": scales, "weight_global_scale": whole}
    return {f"{path}.{name}": tensor for name, tensor in files.items()}, values


def mxfp4_rows(path: str, rows: int, columns: int) -> Made:
    """compressed-tensors' mxfp4-pack-quantized: E2M1 times a power of two for 32 columns."""
    codes, exponents = torch.randint(0, 16, (rows, columns)), torch.randint(110, 130, (rows, columns // 32)).byte()
    values = (FP4[codes] * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)).bfloat16()
    return {f"{path}.weight_packed": halves(codes), f"{path}.weight_scale": exponents}, values


def fp4_scale(path: str, rows: int, columns: int) -> Made:
    """DeepSeek-V4's experts: E2M1 in I8, and a power of two for 32 columns, called `scale`."""
    codes, exponents = torch.randint(0, 16, (rows, columns)), torch.randint(110, 130, (rows, columns // 32)).byte()
    values = (FP4[codes] * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)).bfloat16()
    files = {"weight": halves(codes).view(torch.int8), "scale": exponents.view(torch.float8_e8m0fnu)}
    return {f"{path}.{name}": tensor for name, tensor in files.items()}, values


def nvfp4_modelopt(path: str, rows: int, columns: int) -> Made:
    """Model Optimizer's: the scale of the scales multiplies."""
    codes = torch.randint(0, 16, (rows, columns))
    scales, whole = (torch.rand(rows, columns // 16) * 400).to(torch.float8_e4m3fn), torch.tensor(0.0000271)
    values = (FP4[codes] * (scales.float() * whole).repeat_interleave(16, 1)).bfloat16()
    files = {"weight": halves(codes), "weight_scale": scales, "weight_scale_2": whole, "input_scale": torch.ones(())}
    return {f"{path}.{name}": tensor for name, tensor in files.items()}, values


def fp8_modelopt(path: str, rows: int, columns: int) -> Made:
    weight, scale = torch.randn(rows, columns).to(torch.float8_e4m3fn), torch.tensor(0.0123)
    files = {"weight": weight, "weight_scale": scale, "input_scale": torch.ones(())}
    return {f"{path}.{name}": tensor for name, tensor in files.items()}, (weight.float() * scale).bfloat16()


def llm_int8(path: str, rows: int, columns: int) -> Made:
    """bitsandbytes' own dequantization."""
    import bitsandbytes.functional as bnb

    weight, largest = torch.randint(-127, 128, (rows, columns)).to(torch.int8), torch.rand(rows) + 0.5
    files = {"weight": weight, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {f"{path}.{name}": tensor for name, tensor in files.items()}, bnb.int8_vectorwise_dequant(weight, largest)


def gptq(bits: int, group: int, *, less: int = 1, order: bool = False, dtype: torch.dtype = torch.float16) -> Maker:
    """AutoGPTQ's QuantLinear: codes along the inputs, zeros along the outputs, one `less` than they are."""

    def make(path: str, rows: int, columns: int) -> Made:
        size = columns if group == -1 else group
        codes = torch.randint(0, 2**bits, (columns, rows))
        of = torch.arange(columns) // size
        of = of[torch.randperm(columns)] if order else of
        zeros = torch.randint(0, 2**bits, (int(of.max()) + 1, rows))
        scales = some_scales(*zeros.shape, dtype=dtype)
        values = ((codes - (zeros + less)[of]).to(dtype) * scales[of]).T
        files = {
            "qweight": packed(codes, bits, 0),
            "qzeros": packed(zeros, bits, 1),
            "scales": scales,
            "g_idx": of.int(),
        }
        return {f"{path}.{name}": tensor for name, tensor in files.items()}, values

    return make


def awq(path: str, rows: int, columns: int) -> Made:
    """AutoAWQ's WQLinear_GEMM: code i of an int32 is that of column order_map[i]."""
    order_map = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def along(codes: Tensor) -> Tensor:
        return packed(codes.unflatten(1, (-1, 8))[:, :, order_map].flatten(1), 4, 1)

    codes, zeros = torch.randint(0, 16, (columns, rows)), torch.randint(0, 16, (columns // 128, rows))
    scales = some_scales(*zeros.shape, dtype=torch.float16)
    values = ((codes - zeros.repeat_interleave(128, 0)).half() * scales.repeat_interleave(128, 0)).T
    files = {"qweight": along(codes), "qzeros": along(zeros), "scales": scales}
    return {f"{path}.{name}": tensor for name, tensor in files.items()}, values


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """The quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def _ints(bits: int, group: int | None, *, symmetric: bool = True) -> dict[str, Any]:
    strategy = "group" if group else "channel"
    return compressed(
        "pack-quantized", num_bits=bits, type="int", strategy=strategy, group_size=group, symmetric=symmetric
    )


_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
# What config.json says, and the maker of the weights, by a name for the format.
FORMATS: dict[str, tuple[dict[str, Any], Maker]] = {
    "int4-32": (_ints(4, 32), integers(4, 32)),
    "int4-128-fp16": (_ints(4, 128), integers(4, 128, torch.float16)),
    "int4-zeros": (_ints(4, 32, symmetric=False), integers(4, 32, zeros=True)),
    "int4-rows": (_ints(4, None), integers(4, None, torch.float32)),
    "int4-rows-zeros": (_ints(4, None, symmetric=False), integers(4, None, zeros=True)),
    "int4-order": (_ints(4, 32), integers(4, 32, order=True)),
    "int8-zeros": (_ints(8, 64, symmetric=False), integers(8, 64, zeros=True)),
    "int8-rows": (compressed("int-quantized", num_bits=8, type="int", strategy="channel"), int8_rows),
    "int8-rows-zeros": (
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        int8_rows_zeros,
    ),
    "fp8-rows": (compressed("float-quantized", strategy="channel", **_FP8), fp8_rows(torch.bfloat16)),
    "fp8-whole": (compressed("float-quantized", strategy="tensor", **_FP8), fp8_rows(torch.float32, whole=True)),
    "nvfp4": (compressed("nvfp4-pack-quantized", strategy="tensor_group", group_size=16, **_FP4), nvfp4),
    "mxfp4-rows": (compressed("mxfp4-pack-quantized", strategy="group", group_size=32, **_FP4), mxfp4_rows),
    "nvfp4-modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4_modelopt),
    "fp8-modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_modelopt),
    "llm-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8),
    "gptq-4": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, gptq(4, 128)),
    "gptq-4-order": ({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}, gptq(4, 64, order=True)),
    "gptq-4-16": ({"quant_method": "gptq", "bits": 4, "group_size": 16}, gptq(4, 16)),
    "gptq-8": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, gptq(8, -1, dtype=torch.bfloat16)),
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"},
        gptq(4, 128, less=0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, awq),
    "fp4-scale": ({"quant_method": "fp8", "expert_dtype": "fp4", "weight_block_size": [128, 128]}, fp4_scale),
}
