"""A GGUF file in Q4_0, whose codes are made of the base's weights and follow what was learnt.

A block of Q4_0 has 32 weights of a row: a scale in fp16, and codes from -8 to 7 with which it is multiplied. The scale
is the block's largest weight, with its sign, by -8 (llama.cpp, ggml-quants.c). Here it is that of the base's weights,
as in merges into other codes (trainer/export/write/in_codes.py).

llama.cpp's converter puts weights into its own places, and has no Q4_0. So it converts two folders to 16 bits: the
model in which the linear layers are still the base's, and the change of these layers alone. Both have each weight in
the same place, and the codes of a matrix are made of the two.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from trainer.base.base import Base
from trainer.base.load.load import DTYPES
from trainer.base.rows.parameters import find_all_weights
from trainer.config import Config
from trainer.export.figures import Rounding
from trainer.export.gguf.converter import convert
from trainer.export.write.as_stored import CodesMoved
from trainer.export.write.merged import files_with, write_files
from trainer.model.held import dither
from trainer.state.checkpoint.learnt_weights import LearntWeights
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.safetensors_index import WEIGHT_DTYPES
from trainer.store.store import Store, open_store
from trainer.tuning.method import Addition, WeightUpdate, method_of

BLOCK = 32
_AT_ONCE = 2**22
"""The number of weights that are quantized at once."""
_LAYERS = "blk."
_IN_16_BITS = (GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def export_q4_0(
    folder: Store,
    manifest: CheckpointManifest,
    config: Config,
    base: Base,
    scratch: Path,
    file: Path,
    rounding: Rounding,
) -> CodesMoved:
    """Write the model of a checkpoint over the plain `base` to `file`. `scratch` takes four models in 16 bits.

    Raises as `convert`.
    """
    learnt, moved = LearntWeights(folder, manifest, DTYPES[config.model.dtype]), CodesMoved()
    updates = method_of(config).updates(learnt, base.architecture)
    sides = scratch / "kept", scratch / "change"
    write_sides(base, config, updates, *sides)
    kept, change = (convert_side(side, base, config) for side in sides)
    write_q4_0(kept, change, file, rounding, moved)
    return moved


def convert_side(folder: Path, base: Base, config: Config) -> Path:
    """Convert a model to GGUF in 16 bits, beside its folder."""
    file = folder.with_suffix(".gguf")
    kinds = {source.dtype for source in base.tensors.values() if source.dtype in WEIGHT_DTYPES}
    convert(folder, "bf16" if "BF16" in kinds else "f16", file, config.run.name)
    return file


def write_sides(base: Base, config: Config, updates: Mapping[str, WeightUpdate], kept: Path, change: Path) -> None:
    """Write two models: one with all `updates` but those of linear layers and experts, and one whose linear layers and
    experts are what these updates add to them, and 0 without one."""
    matrices = {part.name: part.shape for part in base.architecture.parameters if part.kind in ("linear", "experts")}
    others = {name: update for name, update in updates.items() if name not in matrices}
    added = {name: _Added(updates.get(name), shape) for name, shape in matrices.items()}
    for folder, given in ((kept, others), (change, added)):
        files = files_with(base, find_all_weights(base), given)
        write_files(base, config, files, open_store(str(folder)), lambda done, total: None)


class _Added:
    """Replaces a weight by what an update adds to it."""

    def __init__(self, update: WeightUpdate | None, shape: tuple[int, ...]) -> None:
        self._update, self._shape = update, shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape if self._update is None else self._update.shape

    def apply_to(self, rows: Tensor, first: int) -> None:
        if self._update is None:
            rows.zero_()
        elif isinstance(self._update, Addition):
            rows.view(-1, self.shape[-1]).copy_(self._update.change(first, rows.numel() // self.shape[-1]))
        else:
            before, after = rows.float(), rows.float().clone()
            self._update.apply_to(after, first)
            rows.copy_(after.sub_(before))


def write_q4_0(kept: Path, change: Path | None, file: Path, rounding: Rounding, moved: CodesMoved) -> None:
    """Write `file` from two GGUF files in 16 bits; without `change` the weights stay the base's.

    Matrices of layers become Q4_0. The embedding and the head become Q8_0, as converters of GGUF usually leave them
    more bits. Everything else stays as it is.
    """
    base = GGUFReader(kept)
    changes = {} if change is None else {tensor.name: tensor for tensor in GGUFReader(change).tensors}
    writer = GGUFWriter(file, base.fields[gguf.Keys.General.ARCHITECTURE].contents())
    for field in base.fields.values():
        if not field.name.startswith("GGUF.") and field.name != gguf.Keys.General.ARCHITECTURE:
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            told = field.contents() if field.name != gguf.Keys.General.FILE_TYPE else LlamaFileType.MOSTLY_Q4_0.value
            writer.add_key_value(field.name, told, field.types[0], sub_type)
    if gguf.Keys.General.QUANTIZATION_VERSION not in base.fields:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in base.tensors:
        shape, kind = tuple(int(side) for side in reversed(tensor.shape)), _kind_of(tensor)
        size = int(np.prod(shape)) // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
        given = gguf.quant_shape_to_byte_shape(shape, kind) if kind != tensor.tensor_type else tensor.data.shape
        dtype = np.dtype(np.uint8) if kind != tensor.tensor_type else tensor.data.dtype
        writer.add_tensor_info(tensor.name, given, dtype, size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in base.tensors:
        kind = _kind_of(tensor)
        if kind == tensor.tensor_type:
            writer.write_tensor_data(tensor.data)
        elif kind == GGMLQuantizationType.Q8_0:
            writer.write_tensor_data(gguf.quantize(_values(tensor), kind))
        else:
            parts = _coded(tensor, changes.get(tensor.name), rounding, moved)
            writer.write_tensor_data(np.concatenate(list(parts)))
    writer.close()


def _kind_of(tensor: Any) -> GGMLQuantizationType:
    """The type that a tensor gets. The converter has left in 32 bits what no one should quantize."""
    if tensor.tensor_type not in _IN_16_BITS or tensor.shape[0] % BLOCK:
        return tensor.tensor_type
    return GGMLQuantizationType.Q4_0 if tensor.name.startswith(_LAYERS) else GGMLQuantizationType.Q8_0


def _values(tensor: Any) -> NDArray[np.float32]:
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def _coded(tensor: Any, change: Any, rounding: Rounding, moved: CodesMoved) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of some rows after others, (rows, bytes of a row)."""
    columns = int(tensor.shape[0])
    weights = tensor.data.reshape(-1, tensor.data.shape[-1])
    changes = None if change is None else change.data.reshape(-1, change.data.shape[-1])
    at_once = max(1, _AT_ONCE // columns)
    for first in range(0, len(weights), at_once):
        rows = slice(first, first + at_once)
        values = torch.from_numpy(gguf.dequantize(weights[rows], tensor.tensor_type))
        added = torch.zeros_like(values)
        if change is not None and changes is not None:
            added = torch.from_numpy(gguf.dequantize(changes[rows], change.tensor_type))
        at = None
        if rounding == "dither":
            at = dither.thresholds(tensor.name, torch.arange(first, first + len(values)), torch.arange(columns))
        made, differing = blocks(values, added, at)
        moved.add(values.numel(), differing)
        yield made.numpy()


def blocks(values: Tensor, change: Tensor, at: Tensor | None) -> tuple[Tensor, int]:
    """Return the blocks (rows, bytes) of weights (rows, columns), fp32, and how many codes the `change` has moved.

    It moves the nearest codes of the weights by the thresholds `at`. Without them it finds the codes nearest the sums.
    """
    rows = len(values)
    scales = _scales(values.view(rows, -1, BLOCK), change.view(rows, -1, BLOCK))
    spread = scales.float().repeat_interleave(BLOCK, 1)
    zeros = torch.full(values.shape, 8, dtype=torch.uint8)
    before = dither.moved("int4", zeros, values / spread, None)
    if at is None:
        codes = dither.moved("int4", zeros, (values + change) / spread, None)
    else:
        codes = dither.moved("int4", before, change / spread, at)
    halves = codes.view(rows, -1, 2, BLOCK // 2)
    packed = halves[:, :, 0] | halves[:, :, 1] << 4
    of_scales = scales.view(rows, -1, 1).view(torch.uint8)
    made = torch.cat([of_scales, packed], -1).view(rows, -1)
    return made, int(codes.ne(before).sum())


def _scales(values: Tensor, change: Tensor) -> Tensor:
    """The scales (rows, blocks), fp16, of weights (rows, blocks, 32). Blocks of zeros have that of their change."""
    given = torch.where((values == 0).all(-1, keepdim=True), change, values)
    largest = given.gather(-1, given.abs().argmax(-1, keepdim=True))[..., 0]
    return (largest / -8).half()
