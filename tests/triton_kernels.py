"""Checks of our Triton kernels without a GPU, each a process, as Triton reads the environment once.

TRITON_INTERPRET=1 python -m tests.triton_kernels interpret     the values, in Triton's interpreter
python -m tests.triton_kernels compile                          binaries for GPUs of three generations
"""

import sys
from unittest.mock import patch

import torch

from trainer.model.held.blockwise import quantize_absmax, quantize_blocks
from trainer.model.held.formats import blocks
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldLinear, HeldStack

CAPABILITIES = (80, 90, 100)


def packed(shape: tuple[int, ...], dtype: torch.dtype) -> HeldLinear | HeldStack:
    """Random weights, double quantized slice by slice."""
    form = Blocks("nf4", 64, True)
    slices = shape[0] if len(shape) == 3 else 1
    module = HeldStack(shape, form, dtype) if len(shape) == 3 else HeldLinear(shape[1], shape[0], form, dtype)
    generator = torch.Generator().manual_seed(sum(shape))
    parts: dict[str, list[torch.Tensor]] = {"weight": [], "absmax": [], "nested_absmax": []}
    for number in range(slices):
        weights = torch.randn(module.numel, generator=generator) * (1 + number)
        nibbles, absmax = quantize_blocks(weights, "nf4", 64)
        codes, nested, module.absmax_mean[number] = quantize_absmax(absmax)
        for part, value in zip(parts.values(), (nibbles, codes, nested.view(torch.uint8)), strict=True):
            part.append(value)
    for name, values in parts.items():
        setattr(module, name, torch.nn.Parameter(torch.cat(values), requires_grad=False))
    return module


def interpret() -> None:
    """The kernel's weights are bitsandbytes' to the last bit: of matrices whose last block is short, and of several of
    a stack at once.
    """
    from trainer.model.kernels import double

    for dtype in (torch.float32, torch.float16):
        for shape in ((64, 96), (7, 33), (48, 512), (3, 64, 256), (2, 5, 13)):
            module = packed(shape, dtype)
            first, last = (1, shape[0]) if len(shape) == 3 else (0, 1)
            plain = module.matrices(first, last)
            called = patch.object(double, "dequantize_double", wraps=double.dequantize_double)
            with patch.object(blocks, "has_one_pass", return_value=True), called as kernel:
                ours = module.matrices(first, last)
            assert kernel.called
            assert torch.equal(ours, plain), (shape, dtype)
            module.absmax_mean += 1e-3  # the control: another mean gives other weights
            assert not torch.equal(module.matrices(first, last), plain)
    print("interpreted")


def compiled() -> None:
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from trainer.model.kernels.double import dequantize

    signature = {
        **dict.fromkeys(("packed", "codes"), "*u8"),
        **dict.fromkeys(("nested", "means", "code", "table"), "*fp32"),
        "values": "*bf16",
        **dict.fromkeys(("numel", "blocks", "slice_blocks"), "i32"),
        **dict.fromkeys(("BLOCK", "NESTED", "COUNT"), "constexpr"),
    }
    source = ASTSource(dequantize, signature, {"BLOCK": 64, "NESTED": 256, "COUNT": 16})
    for capability in CAPABILITIES:
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
        assert "fma" not in binary.asm["ptx"], "a fused operation rounds once where bitsandbytes rounds twice"
        print(f"sm_{capability}: {len(binary.asm['cubin'])} bytes")


if __name__ == "__main__":
    {"interpret": interpret, "compile": compiled}[sys.argv[1]]()
