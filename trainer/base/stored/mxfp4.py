"""Bases whose experts are in MXFP4, as in gpt-oss: blocks of 32 weights in 4 bits, with a power of two as scale.

Where a plain base has `experts.gate_up_proj` (experts, inputs, outputs), the files have `experts.gate_up_proj_blocks`
(experts, outputs, inputs / 32, 16), two weights a byte, the lower half first, and `experts.gate_up_proj_scales`
(experts, outputs, inputs / 32), exponents plus 127 (OCP Microscaling specification 1.0). All other weights are in 16
bits.

Each weight is exactly a bf16 number, the one that transformers' dequantize=True gives. Matrices are multiplied and
quantized in transformers' order, which is the transpose of the stored one. So a range of an expert needs bytes from all
over the stored expert, and an expert is read whole.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from trainer.base.architecture import Parameter
from trainer.base.base import Base, StoredFormat
from trainer.base.stored.shared.cached_values import LastReads
from trainer.base.stored.shared.skipped_layers import is_listed
from trainer.errors import ConfigError
from trainer.model.held.codes import Code, KeptWeight
from trainer.store.safetensors_index import StoredTensor, numel

# Keep blocks and scales of two experts, because pieces of two may be in flight. Each expert of gpt-oss has about 9 MB.
_READS_KEPT = 4


class Mxfp4(StoredFormat):
    """Experts in MXFP4. All other weights are as in a plain base."""

    readable: ClassVar[str] = "MXFP4"
    dequantizes: ClassVar[bool] = True

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == "mxfp4"

    def kept(self, parameter: Parameter) -> KeptWeight | None:
        stack = parameter.kind == "experts" and not is_listed(
            parameter, self.quantization.get("modules_to_not_convert")
        )
        return KeptWeight(Code("e2m1", (1, 32)), "F8_E8M0", "BF16", transposed=True) if stack else None

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        last_reads, found = LastReads(_READS_KEPT), dict[str, StoredTensor](base.tensors)
        for blocks in base.tensors:
            name = blocks.removesuffix("_blocks")
            if name != blocks:
                found[name] = _decoding(base, name, last_reads)
                for part in _parts(name):
                    del found[part]
        return found


def _decoding(base: Base, name: str, last_reads: LastReads) -> StoredTensor:
    """The decoded weight `name`. Raises `ConfigError` unless `base` has a scale for each of its blocks."""
    # Only code that reads weights imports numpy. `plan` does not, and answers sooner.
    from trainer.base.stored.shared.coded import BLOCK, Mxfp4Experts

    blocks, scales = (base.tensors.get(part) for part in _parts(name))
    assert blocks is not None
    if (
        scales is None
        or (blocks.dtype, scales.dtype) != ("U8", "U8")
        or len(blocks.shape) != 4
        or blocks.shape != (*scales.shape, BLOCK // 2)
        or not numel(blocks)
    ):
        given = "no scales" if scales is None else f"scales {list(scales.shape)} of {scales.dtype}"
        raise ConfigError(
            f"model.base: {name} has blocks {list(blocks.shape)} of {blocks.dtype} and {given} in {base.name}. MXFP4"
            " has (experts, outputs, inputs / 32, 16) and (experts, outputs, inputs / 32) of U8. Copy the model again."
        )
    return Mxfp4Experts(blocks, scales, last_reads)


def _parts(name: str) -> tuple[str, str]:
    """The names of the tensors that the files have in place of a stack of experts: blocks and scales."""
    return f"{name}_blocks", f"{name}_scales"


STORED: dict[str, type[StoredFormat]] = {"mxfp4": Mxfp4}
