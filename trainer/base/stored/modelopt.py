"""Bases of NVIDIA's Model Optimizer: NVFP4, and FP8 with a scale for each matrix.

Beside `weight` the files have `weight_scale`. In NVFP4 a byte of `weight` has two E2M1 numbers, and `weight_scale` has
one E4M3 number for 16 columns, which is multiplied by `weight_scale_2`, one fp32 number for the whole matrix
(modelopt/torch/quantization/qtensor/nvfp4_tensor.py). Weights become bf16 when they are read: the product is computed
in fp32 and rounded once.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

from trainer.base.architecture import Parameter
from trainer.base.base import Base, StoredFormat
from trainer.base.stored.shared.cached_values import LastReads
from trainer.base.stored.shared.skipped_layers import is_listed
from trainer.errors import ConfigError
from trainer.model.held.codes import Code, KeptWeight
from trainer.store.safetensors_index import StoredTensor, TensorSource, numel

_BESIDE = ("weight_scale", "weight_scale_2", "input_scale")
_CACHE = ("k_scale", "v_scale")


class ModelOpt(StoredFormat):
    """Linear layers in 4 or 8 bits. All other weights are as in a plain base."""

    readable: ClassVar[str] = "NVFP4 and FP8 of Model Optimizer"

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == "modelopt" and quantization.get("quant_algo") in ("NVFP4", "FP8")

    def kept(self, parameter: Parameter) -> KeptWeight | None:
        if not parameter.matrices or is_listed(parameter, self.quantization.get("ignore")):
            return None
        if self.quantization["quant_algo"] == "NVFP4":
            return KeptWeight(Code("e2m1", (1, 16)), "F8_E4M3", "BF16", seconds="times")
        rows, columns = parameter.shape[-2:]
        return KeptWeight(Code("e4m3", (rows, columns)), "F32", "BF16")

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        last_reads, found = LastReads(), dict[str, StoredTensor](base.tensors)
        for name, source in base.tensors.items():
            path, _, leaf = name.rpartition(".")
            if leaf == "weight" and source.dtype in ("U8", "F8_E4M3"):
                found[name] = _coded(base, path, source, last_reads)
                for part in _BESIDE:
                    found.pop(f"{path}.{part}", None)
            elif leaf in _CACHE:
                del found[name]
        return found


def _coded(base: Base, path: str, source: TensorSource, last_reads: LastReads) -> StoredTensor:
    """The weight of the linear layer at `path`. Raises `ConfigError` if its scales are missing or have a bad shape."""
    from trainer.base.stored.shared.coded import Coded

    scales, second = (base.tensors.get(f"{path}.{leaf}") for leaf in ("weight_scale", "weight_scale_2"))
    nvfp4 = source.dtype == "U8"
    if len(source.shape) >= 2 and scales is not None:
        shape = (*source.shape[:-1], source.shape[-1] * (2 if nvfp4 else 1))
        code = Code("e2m1", (1, 16)) if nvfp4 else Code("e4m3", (shape[-2], shape[-1]))
        if numel(scales) == prod(shape[:-2]) * prod(code.tiles(shape[-2], shape[-1])):
            if not nvfp4:
                return Coded(source, scales, shape, code, last_reads)
            if scales.dtype == "F8_E4M3" and second is not None and numel(second) == 1:
                return Coded(source, scales, shape, code, last_reads, second=second)
    raise ConfigError(
        f"model.base: {path} has no scales in {base.name} that belong to its weight of {source.dtype}, weight_scale and"
        " in NVFP4 weight_scale_2. Copy the model again."
    )


STORED: dict[str, type[StoredFormat]] = {"modelopt": ModelOpt}
