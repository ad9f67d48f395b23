"""The decoded values of a base in fewer bits, with which proofs compare.

transformers decodes FP8 and MXFP4. Formats for which transformers needs another package are decoded by our own reader.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from trainer.base.base import Base
from trainer.base.partitions.filling import as_tensor
from trainer.store.safetensors_index import PackedTensor, numel


@contextmanager
def dequantized_by_transformers(config: PretrainedConfig) -> Iterator[None]:
    """Inside, `from_pretrained` decodes the base's weights to bf16 on any device. `config` is the base's.

    FP8's tiles have the size that `config` says. transformers 5.24 itself divides a matrix into as many equal tiles as
    there are scales. That is right only for whole tiles, so a matrix is padded with zeros and cut again.
    tests/unit/base/test_stored_formats.py fails when this is no longer needed.
    """
    stored: Any = config.quantization_config
    stored["dequantize"] = True
    tile, by_number = stored.get("weight_block_size", [128, 128]), Fp8Dequantize._dequantize_one

    def by_size(
        self: Fp8Dequantize, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        if quantized.dtype == torch.int8:  # two numbers of 4 bits
            return by_number(self, quantized, scales, output_dtype or torch.bfloat16)
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


def decoded_here(base: Base) -> dict[str, Tensor]:
    """Return the values of all weights in the files of a base, by name. The whole base is then in memory."""
    found = dict[str, Tensor]()
    for name, source in base.weights.items():
        assert not isinstance(source, PackedTensor)
        values = as_tensor(source.read(0, numel(source)), source) if numel(source) else torch.empty(0)
        found[name] = values.view(source.shape)
    return found
