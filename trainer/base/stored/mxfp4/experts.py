"""Reads the values of a stack of experts in MXFP4, decoded to bf16 and in transformers' order."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.base.stored.shared.cached_values import LastReads
from trainer.base.stored.shared.floats import DECODED_AT_ONCE, E2M1, E8M0
from trainer.base.stored.shared.moving import Change, portions
from trainer.model.held import dither
from trainer.model.held.codes import Code, Kept, KeptSources
from trainer.store.safetensors_index import PackedSources, StoredTensor, TensorSource, as_bytes

BLOCK = 32
_LOWER, _UPPER = E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]


@dataclass(frozen=True)
class Mxfp4Experts:
    """The bf16 values of a stack (experts, inputs, outputs) whose transpose is stored in `blocks` and `scales`."""

    blocks: TensorSource
    scales: TensorSource
    last_reads: LastReads
    dtype: str = "BF16"

    by_columns: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, groups, _ = self.blocks.shape
        return experts, groups * BLOCK, outputs

    @property
    def kept(self) -> KeptSources:
        """The sources of its codes and scales, with which it can stay as it is."""
        parts: dict[str, StoredTensor] = {"weight": as_bytes(self.blocks), "scales": as_bytes(self.scales)}
        kept = Kept(Code("e2m1", (1, BLOCK)), "F8_E8M0", self.dtype, transposed=True)
        return KeptSources(kept, PackedSources(parts, None))

    def read(self, begin: int, end: int) -> bytearray:
        data = bytearray(2 * (end - begin))
        decoded = np.frombuffer(data, np.uint16)
        _, inputs, outputs = self.shape
        size, strip = inputs * outputs, BLOCK * outputs
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

    @property
    def codes(self) -> TensorSource:
        return self.blocks

    @property
    def unit(self) -> int:
        return self.shape[1] // 2

    def move(self, units: Tensor, first: int, change: Change) -> int:
        """As `Movable`: a unit has the weights of one output of one expert."""
        _, inputs, outputs = self.shape
        differing = 0
        for begin, end in portions(len(units), inputs, lambda unit: outputs - (first + unit) % outputs):
            expert, output = divmod(first + begin, outputs)
            codes = dither.unpacked(units[begin:end], 4)
            across = inputs // BLOCK
            raw = self.scales.read((first + begin) * across, (first + end) * across)
            scales = torch.from_numpy(E8M0[np.frombuffer(raw, np.uint8)]).view(-1, across).repeat_interleave(BLOCK, 1)
            of = torch.arange(output, output + end - begin)
            at = change.thresholds(expert * inputs + torch.arange(inputs), of)
            steps = change.of_columns(expert, output, output + end - begin) / scales
            found = dither.moved("e2m1", codes, steps, None if at is None else at.T)
            differing += int(found.ne(codes).sum())
            units[begin:end] = dither.packed(found, 4)
        return differing

    def _expert(self, expert: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The blocks (outputs, inputs / 32, 16) and the scales (outputs, inputs / 32) of an expert."""
        _, outputs, groups, half = self.blocks.shape
        count = outputs * groups
        blocks = self.last_reads.read(self.blocks, expert * count * half, (expert + 1) * count * half)
        scales = self.last_reads.read(self.scales, expert * count, (expert + 1) * count)
        return (
            np.frombuffer(blocks, np.uint8).reshape(outputs, groups, half),
            np.frombuffer(scales, np.uint8).reshape(outputs, groups),
        )


def _decoded(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> Iterator[NDArray[np.uint32]]:
    """Yield the bf16 bits of one block of each output: blocks (outputs, 16), scales (outputs,) -> (32 * outputs,).

    The values come input by input, each with all of its outputs, and some inputs at a time."""
    pairs, powers = np.ascontiguousarray(blocks.T), E8M0[scales]
    at_once = max(1, DECODED_AT_ONCE // 2 // len(scales))
    for first in range(0, len(pairs), at_once):
        part = pairs[first : first + at_once]
        values = np.stack([_LOWER.take(part, mode="clip"), _UPPER.take(part, mode="clip")], axis=1)
        with np.errstate(over="ignore"):  # transformers also gets infinity there
            values *= powers
        # The upper half of the fp32 number is exact: the mantissa has two bits, and bf16 has all of the exponents.
        bits = values.reshape(-1).view(np.uint32)
        bits >>= 16
        yield bits
