"""Bases of GPTQ and AWQ: integers of 4 or 8 bits, with a scale and a zero for each group of inputs of an output.

Instead of `weight` (outputs, inputs) the files hold its transpose as

- `qweight` of I32, each with eight 4-bit or four 8-bit codes. GPTQ packs along the inputs. AWQ packs along the outputs,
  in the order of columns 0, 2, 4, 6, 1, 3, 5, 7;
- `qzeros` of I32 (groups, outputs / codes an int32): the codes that mean 0; GPTQ's first `checkpoint_format` stores
  them minus one;
- `scales` (groups, outputs), and in GPTQ `g_idx`, the group of each input. Under `desc_act` the inputs of a group do
  not lie together.

Weights are read in the type of their scales: (code - zero) * scale, rounded once, as AutoGPTQ and AutoAWQ dequantize
them.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar

from trainer.base.base import Base, StoredFormat
from trainer.base.stored.shared.cached_values import LastReads
from trainer.config import Config
from trainer.errors import ConfigError, shown
from trainer.store.safetensors_index import WEIGHT_DTYPES, StoredTensor, TensorSource

_KEPT = 8  # codes, zeros, scales and groups of two matrices, because pieces of two may be in flight
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class Gptq(StoredFormat):
    """Linear layers in 4 or 8 bits. All other weights are as in a plain base."""

    readable: ClassVar[str] = "GPTQ in 4 and 8 bits"

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == "gptq" and quantization.get("bits") in (4, 8)

    def mismatches(self, config: Config) -> list[str]:
        form, wrong = self.quantization.get("checkpoint_format", "gptq"), _wrong_groups(self.quantization)
        if form in ("gptq", "gptq_v2"):
            return wrong
        return [
            *wrong,
            (
                f"model.base: config.json has checkpoint_format {shown(form)} in its quantization_config. Readable are"
                " gptq and gptq_v2. Give the 16-bit model; quant.type quantizes it."
            ),
        ]

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        more = int(self.quantization.get("checkpoint_format", "gptq") == "gptq")
        return _weights(base, self.quantization, along_outputs=False, more=more)


class Awq(StoredFormat):
    """Linear layers in 4 bits. All other weights are as in a plain base."""

    readable: ClassVar[str] = "AWQ"

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        version = str(quantization.get("version", "gemm")).lower()
        return (quantization.get("quant_method"), quantization.get("bits"), version) == ("awq", 4, "gemm")

    def mismatches(self, config: Config) -> list[str]:
        return _wrong_groups(self.quantization)

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        return _weights(base, self.quantization, along_outputs=True, more=0)


def _wrong_groups(quantization: dict[str, Any]) -> list[str]:
    group = quantization.get("group_size", -1)
    if type(group) is int and (group == -1 or group > 0):
        return []
    return [
        f"model.base: config.json has group_size {shown(group)} in its quantization_config. Possible are whole numbers"
        " from 1 on, and -1, which is all inputs. Copy the model again."
    ]


def _weights(base: Base, quantization: dict[str, Any], *, along_outputs: bool, more: int) -> dict[str, StoredTensor]:
    last_reads, found = LastReads(_KEPT), dict[str, StoredTensor](base.tensors)
    bits, group = quantization["bits"], quantization.get("group_size", -1)
    for name, source in base.tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "qweight":
            continue
        found[f"{path}.weight"] = _columns(base, path, source, bits, group, along_outputs, more, last_reads)
        for part in _PARTS:
            found.pop(f"{path}.{part}", None)
    return found


def _columns(
    base: Base, path: str, codes: TensorSource, bits: int, group: int, along: bool, more: int, last_reads: LastReads
) -> StoredTensor:
    """The weight of the linear layer at `path`. Raises `ConfigError` if a part is missing or has a wrong shape."""
    from trainer.base.stored.shared.columns import PackedColumns

    part = {leaf: base.tensors.get(f"{path}.{leaf}") for leaf in _PARTS}
    zeros, scales, group_of = part["qzeros"], part["scales"], part["g_idx"]
    each = 32 // bits
    if len(codes.shape) == 2 and zeros is not None and scales is not None and scales.dtype in WEIGHT_DTYPES:
        inputs, outputs = (codes.shape[0] * (1 if along else each), codes.shape[1] * (each if along else 1))
        size = inputs if group == -1 else group
        groups = ceil(inputs / size)
        right = [
            (codes.dtype, zeros.dtype) == ("I32", "I32"),
            scales.shape == (groups, outputs),
            zeros.shape == (groups, ceil(outputs / each)),
            group_of is None or (group_of.dtype, group_of.shape) == ("I32", (inputs,)),
        ]
        if all(right):
            order = _AWQ_ORDER if along else tuple(range(each))
            shifts = tuple(bits * place for place in order)
            return PackedColumns(
                codes, zeros, scales, (outputs, inputs), bits, size, last_reads, shifts, more, along, group_of
            )
    given = [f"{leaf} {list(found.shape)} of {found.dtype}" for leaf, found in part.items() if found is not None]
    raise ConfigError(
        f"model.base: {path} has {', '.join(given)} in {base.name}, which are not those of one "
        f"matrix in {bits} bits with groups of {group}. Give the config.json that belongs to these files."
    )


STORED: dict[str, type[StoredFormat]] = {"gptq": Gptq, "awq": Awq}
