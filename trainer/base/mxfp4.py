"""Bases whose experts are in MXFP4, as gpt-oss is published: blocks of 32 weights, 4 bits each, with a power of two as scale.

Where a plain base has `experts.gate_up_proj` (experts, inputs, outputs), the files have `experts.gate_up_proj_blocks` (experts,
outputs, inputs / 32, 16), two weights a byte, the lower half first, and `experts.gate_up_proj_scales` (experts, outputs, inputs / 32),
exponents plus 127 (OCP Microscaling specification 1.0). All else is in 16 bits.

Each weight is a bf16 number exactly, the one that transformers' dequantize=True gives. It is also put in transformers' order, in
which matrices are multiplied and quantized: the transpose of the stored one. So a range of an expert needs bytes from all over
it, and an expert is read whole.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trainer.base.base import Base
from trainer.base.floats import DECODED_AT_ONCE, E2M1, E8M0
from trainer.base.last_reads import LastReads
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.safetensors_index import StoredTensor, TensorSource, numel

_BLOCK = 32
# Blocks and scales of two experts are kept, as pieces of two may be in flight: some 9 MB each in both sizes of gpt-oss.
_READS_KEPT = 4
_LOWER, _UPPER = E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]


@dataclass(frozen=True)
class Mxfp4Experts:
    """The bf16 values of a stack (experts, inputs, outputs) whose transpose is stored in `blocks` and `scales`."""

    blocks: TensorSource
    scales: TensorSource
    last_reads: LastReads
    dtype: str = "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, groups, _ = self.blocks.shape
        return experts, groups * _BLOCK, outputs

    def read(self, begin: int, end: int) -> bytearray:
        data = bytearray(2 * (end - begin))
        decoded = np.frombuffer(data, np.uint16)
        _, inputs, outputs = self.shape
        size, strip = inputs * outputs, _BLOCK * outputs
        for expert in range(begin // size, math.ceil(end / size)):
            blocks, scales = self._expert(expert)
            first, last = max(begin, expert * size), min(end, (expert + 1) * size)
            for start in range(first // strip * strip, last, strip):
                group = start % size // strip
                at = start
                for values in _decoded(blocks[:, group], scales[:, group]):
                    low, high = max(first, at), min(last, at + len(values))
                    if low < high:
                        decoded[low - begin : high - begin] = values[low - at : high - at]
                    at += len(values)
        return data

    def _expert(self, expert: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Its blocks (outputs, inputs / 32, 16) and scales (outputs, inputs / 32)."""
        _, outputs, groups, half = self.blocks.shape
        count = outputs * groups
        blocks = self.last_reads.read(self.blocks, expert * count * half, (expert + 1) * count * half)
        scales = self.last_reads.read(self.scales, expert * count, (expert + 1) * count)
        return (
            np.frombuffer(blocks, np.uint8).reshape(outputs, groups, half),
            np.frombuffer(scales, np.uint8).reshape(outputs, groups),
        )


def _decoded(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> Iterator[NDArray[np.uint32]]:
    """The bits of bf16 of a block of each output, input by input, all outputs of one after another, some inputs at a time:
    blocks (outputs, 16), scales (outputs,) -> some of (32 * outputs,)."""
    pairs, powers = np.ascontiguousarray(blocks.T), E8M0[scales]
    at_once = max(1, DECODED_AT_ONCE // 2 // len(scales))
    for first in range(0, len(pairs), at_once):
        part = pairs[first : first + at_once]
        values = np.stack([_LOWER.take(part, mode="clip"), _UPPER.take(part, mode="clip")], axis=1)
        with np.errstate(over="ignore"):  # infinity is what transformers has there too
            values *= powers
        # The upper half of an fp32 number is all of it here: two bits of mantissa, and no exponent that bf16 has not.
        bits = values.reshape(-1).view(np.uint32)
        bits >>= 16
        yield bits


@dataclass(frozen=True)
class Mxfp4:
    """Experts in MXFP4, all else as in a plain base."""

    quantization: dict[str, Any]

    unmergeable: ClassVar[str | None] = "stored in MXFP4, where no new weight fits"
    quantized: ClassVar[bool] = False
    decoded: ClassVar[bool] = True

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        """Whether a quantization_config is of this format."""
        return quantization.get("quant_method") == "mxfp4"

    def mismatches(self, config: Config) -> list[str]:
        return []

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        last_reads, found = LastReads(_READS_KEPT), dict[str, StoredTensor](base.tensors)
        for blocks in base.tensors:
            name = blocks.removesuffix("_blocks")
            if name != blocks:
                found[name] = _decoding(base, name, last_reads)
                for part in _parts(name):
                    del found[part]
        return found

    def check(self, base: Base, config: Config) -> None:
        pass


def _decoding(base: Base, name: str, last_reads: LastReads) -> Mxfp4Experts:
    """Raises `ConfigError` unless `base` has a scale for each block of `name`."""
    blocks, scales = (base.tensors.get(part) for part in _parts(name))
    assert blocks is not None
    if (
        scales is None
        or (blocks.dtype, scales.dtype) != ("U8", "U8")
        or len(blocks.shape) != 4
        or blocks.shape != (*scales.shape, _BLOCK // 2)
        or not numel(blocks)
    ):
        given = "no scales" if scales is None else f"scales {list(scales.shape)} of {scales.dtype}"
        raise ConfigError(
            f"model.base: {name} has blocks {list(blocks.shape)} of {blocks.dtype} and {given} in {base.name}. MXFP4 has (experts, "
            "outputs, inputs / 32, 16) and (experts, outputs, inputs / 32) of U8. Copy the model again."
        )
    return Mxfp4Experts(blocks, scales, last_reads)


def _parts(name: str) -> tuple[str, str]:
    """The names of what the files have in the place of a stack of experts."""
    return f"{name}_blocks", f"{name}_scales"
