"""Bases of compressed-tensors, as llm-compressor and Kimi K2 have them: integers or floats of 4 or 8 bits.

`config_groups` (config.json, quantization_config) says how the weights of some linear layers are stored; the files show
which layers these are. `strategy` says what shares a scale: a `group` of `group_size` columns of a row, a row
(`channel`), a `block` of `block_structure`, or the whole matrix (`tensor`). The files have `weight_scale`, and instead
of `weight` (rows, columns)

- `weight_packed` of I32, each with eight 4-bit or four 8-bit codes, which count from the smallest number up
  (pack-quantized). If they are not symmetric, `weight_zero_point` has the codes that mean 0, packed along the rows
  (int-quantized: one in I8 for each tile).
  `weight_g_idx` has the group of each column, if the columns of a group do not lie together;
- `weight_packed` of U8, two E2M1 numbers each, with E4M3 scales for 16 columns that `weight_global_scale` divides
  (nvfp4-pack-quantized), or with powers of two for 32 (mxfp4-pack-quantized);
- `weight` in FP8 (float-quantized) or in 8-bit integers (int-quantized).

Weights are read in the type of their scales, or in bf16 if that type has 8 bits, as the compressed-tensors package
decompresses them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

from trainer.base.architecture import Parameter
from trainer.base.base import Base, StoredFormat
from trainer.base.stored.shared.cached_values import LastReads
from trainer.base.stored.shared.skipped_layers import is_listed
from trainer.config import Config
from trainer.errors import ConfigError, shown
from trainer.model.held.codes import Code, KeptWeight, Numbers
from trainer.store.safetensors_index import WEIGHT_DTYPES, StoredTensor, TensorSource, numel

_FORMATS = (
    "pack-quantized",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)
# The endings of what the files have beside a weight: its scales, and those of inputs, outputs and the cache.
_BESIDE = re.compile(
    r"\.(weight_(packed|scale|shape|zero_point|g_idx|global_scale)|(input|output|[kvq])_(scale|zero_point|global_scale))$"
)


class CompressedTensors(StoredFormat):
    """Linear layers in 4 or 8 bits. All other weights are as in a plain base."""

    readable: ClassVar[str] = "compressed-tensors (INT4, INT8, FP8, NVFP4, MXFP4)"

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        sparsity = quantization.get("sparsity_config")
        sparse = bool(sparsity) and not (isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense")
        known = quantization.get("format") in _FORMATS
        return quantization.get("quant_method") == "compressed-tensors" and known and not sparse

    def mismatches(self, config: Config) -> list[str]:
        try:
            list(self._schemes())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return [
                f"model.base: config.json has config_groups that cannot be read ({shown(str(error))[1:-1]}) in its "
                "quantization_config. Copy the model again."
            ]
        return []

    def _schemes(self) -> Iterator["_Scheme"]:
        for group in self.quantization["config_groups"].values():
            weights = group["weights"]
            if weights is not None:
                yield _Scheme.of(weights)

    def kept(self, parameter: Parameter) -> KeptWeight | None:
        if not parameter.matrices or is_listed(parameter, self.quantization.get("ignore")):
            return None
        scheme = next(self._schemes(), None)
        return None if scheme is None else scheme.kept(parameter)

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        last_reads, found = LastReads(), dict[str, StoredTensor](base.tensors)
        schemes = list(dict.fromkeys(self._schemes()))
        for name, source in base.tensors.items():
            path, _, leaf = name.rpartition(".")
            if leaf == "weight_packed" or (leaf == "weight" and source.dtype in ("F8_E4M3", "I8")):
                found[f"{path}.weight"] = _coded(base, path, source, schemes, last_reads)
            if _BESIDE.search(name):
                del found[name]
        return found


@dataclass(frozen=True)
class _Scheme:
    """How the weights of a group of layers are stored: codes of `bits`, of the `number` int or float.

    A side of a tile that is None reaches over the whole matrix.
    """

    number: str
    bits: int
    tile: tuple[int | None, int | None]
    symmetric: bool
    order: bool

    @classmethod
    def of(cls, weights: dict[str, Any]) -> "_Scheme":
        """The scheme of a group's `weights`. Raises `KeyError`, `TypeError` or `ValueError` if they are malformed."""
        strategy, bits, number = weights.get("strategy"), weights["num_bits"], weights.get("type", "int")
        tiles: dict[Any, Any] = {
            "tensor": (None, None),
            "channel": (1, None),
            "group": (1, weights.get("group_size")),
            "tensor_group": (1, weights.get("group_size")),
            "block": tuple(weights.get("block_structure") or ()),
        }
        if strategy not in tiles or (number, bits) not in (("int", 4), ("int", 8), ("float", 4), ("float", 8)):
            raise ValueError(f"{number} of {bits} bits by {strategy}")
        tile = tiles[strategy]
        sides = [side for side in tile if side is not None]
        if len(tile) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"group_size or block_structure {weights.get('group_size')}")
        return cls(number, bits, tile, bool(weights.get("symmetric", True)), weights.get("actorder") == "group")

    def kept(self, parameter: Parameter) -> KeptWeight | None:
        """How this scheme stores a weight, if its scales have the usual form and it may stay as it is."""
        rows, columns = parameter.shape[-2:]
        down, across = self.tile
        numbers: dict[tuple[str, int], Numbers] = {("int", 4): "int4", ("int", 8): "offset8", ("float", 8): "e4m3"}
        if across in (16, 32):
            numbers["float", 4] = "e2m1"
        if self.order or (self.number, self.bits) not in numbers:
            return None
        code = Code(numbers[self.number, self.bits], (down or rows, across or columns))
        if code.numbers == "e2m1":
            nvfp4 = across == 16
            return KeptWeight(code, "F8_E4M3" if nvfp4 else "F8_E8M0", "BF16", seconds="over" if nvfp4 else "none")
        return KeptWeight(code, "BF16", "BF16", zeros=not self.symmetric)

    def code(self, source: TensorSource) -> tuple[Code, tuple[int, ...]] | None:
        """The code of the values in `source`, and the shape of the weight. None if this scheme does not fit."""
        kinds = {
            ("int", 4, "I32"): ("int4", 8),
            ("int", 8, "I32"): ("offset8", 4),
            ("float", 4, "U8"): ("e2m1", 2),
            ("float", 8, "F8_E4M3"): ("e4m3", 1),
            ("int", 8, "I8"): ("int8", 1),
        }
        found: Any = kinds.get((self.number, self.bits, source.dtype))
        if found is None or len(source.shape) < 2:
            return None
        numbers, each = found
        shape = (*source.shape[:-1], source.shape[-1] * each)
        down, across = self.tile
        return Code(numbers, (shape[-2] if down is None else down, shape[-1] if across is None else across)), shape


def _coded(base: Base, path: str, source: TensorSource, schemes: list[_Scheme], last_reads: LastReads) -> StoredTensor:
    """The weight of the linear layer at `path`, whose codes are `source`.

    Raises `ConfigError` if a part of it is missing or has a wrong shape."""
    from trainer.base.stored.shared.coded import SCALES, Coded

    part = {
        leaf: base.tensors.get(f"{path}.weight_{leaf}") for leaf in ("scale", "zero_point", "g_idx", "global_scale")
    }
    scales, zeros = part["scale"], part["zero_point"]
    for scheme in schemes:
        found = scheme.code(source)
        if found is None or scales is None or scales.dtype not in SCALES:
            continue
        code, shape = found
        tiles = code.tiles(shape[-2], shape[-1])
        if numel(scales) != prod(shape[:-2]) * prod(tiles):
            continue
        dtype = scales.dtype if scales.dtype in WEIGHT_DTYPES else "BF16"
        second, order = part["global_scale"], part["g_idx"]
        weight = Coded(source, scales, shape, code, last_reads, dtype, second, second_divides=True, order=order)
        if scheme.symmetric or scheme.number != "int":
            return weight
        packed = (-(-tiles[0] * code.bits // 32), tiles[1])
        wanted = {"I32": ("I32", packed), "I8": ("I8", tiles)}.get(source.dtype)
        if zeros is not None and (zeros.dtype, zeros.shape) == wanted:
            return replace(weight, zeros=zeros)
    given = [f"{leaf} {list(found.shape)} of {found.dtype}" for leaf, found in part.items() if found is not None]
    raise ConfigError(
        f"model.base: {path} has weights {list(source.shape)} of {source.dtype} in {base.name}, and beside them "
        f"{', '.join(given) or 'nothing'}, which no group of its quantization_config "
        "describes. Give the config.json that belongs to these files."
    )


STORED: dict[str, type[StoredFormat]] = {"compressed-tensors": CompressedTensors}
