"""A base in FP8 or MXFP4 as transformers decodes it, which proofs compare with: nothing of our own decoding is used here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


@contextmanager
def dequantized_by_transformers(config: PretrainedConfig) -> Iterator[None]:
    """Inside, `from_pretrained` with `config`, that of the base, decodes its weights to bf16 on any device, and has FP8's
    tiles of the size that `config` says.

    By itself transformers 5.24 divides a matrix into as many equal tiles as there are scales. Whole tiles are those, so a
    matrix is filled up with zeros and cut again; tests/unit/test_stored_formats.py fails when it is needed no more.
    """
    stored: Any = config.quantization_config
    stored["dequantize"] = True
    tile, by_number = stored.get("weight_block_size", [128, 128]), Fp8Dequantize._dequantize_one

    def by_size(
        self: Fp8Dequantize, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        rows, columns = quantized.shape[-2:]
        down, across = tile or (rows, columns)
        whole = nn.functional.pad(quantized.view(torch.uint8), (0, -columns % across, 0, -rows % down))
        values = by_number(self, whole.view(quantized.dtype), scales, torch.bfloat16)
        return values[..., :rows, :columns].to(output_dtype or torch.bfloat16)

    Fp8Dequantize._dequantize_one = by_size
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = by_number
