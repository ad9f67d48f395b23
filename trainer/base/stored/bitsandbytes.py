"""Bases that bitsandbytes quantized. Packed 4-bit weights are loaded as they are.

Beside each packed `weight`, `save_pretrained` writes `weight.absmax` and `weight.quant_state.bitsandbytes__nf4` (or
fp4), JSON as bytes; under double quantization also `weight.nested_absmax` and `weight.nested_quant_map`.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from trainer.base.base import Base, StoredFormat
from trainer.base.stored.shared.cached_values import LastReads
from trainer.config import Config
from trainer.errors import NOT_JSON, ConfigError
from trainer.model.held.codes import Code
from trainer.store.safetensors_index import DTYPE_BYTES, PackedSources, PackedTensor, StoredTensor, TensorSource, numel

_STATE = ".quant_state.bitsandbytes__"
_NESTED_BLOCK = 256
_MOST_NUMBERS = 2**16  # more than any quant_state or nested_quant_map needs
# SHA-256 of bitsandbytes.functional.create_dynamic_map() as fp32, the values of 8-bit scales.
_NESTED_MAP = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
_PART_OF_127 = 0.007874015718698502  # bitsandbytes/functional.py, int8_vectorwise_dequant
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class BitsAndBytes4bit(StoredFormat):
    """Linear layers in 4 bits, also as a mixture's experts. All other weights are as in a plain base."""

    readable: ClassVar[str] = "4 bits by bitsandbytes"
    unmergeable: ClassVar[str | None] = "stored in 4 bits, where no merged weight fits"
    quantized: ClassVar[bool] = True
    decoded: ClassVar[bool] = False

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == "bitsandbytes" and bool(quantization.get("load_in_4bit"))

    def mismatches(self, config: Config) -> list[str]:
        found, stored = list[str](), self.quantization
        kind, double = stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant"))
        if (config.quant.type, config.quant.double) != (kind, double):
            found.append(
                f"quant: the base is quantized already, and loaded as it is. Set quant.type: {kind} and quant.double: "
                f"{str(double).lower()}."
            )
        if config.quant.cache:
            found.append("quant.cache: true has no effect, as the base is quantized already. Remove it.")
        return found

    def tensors(self, base: Base) -> Mapping[str, StoredTensor | PackedTensor]:
        """Reads a few hundred bytes for each weight in 4 bits, all at once."""
        facts = _read_facts(base)
        others = {name: base.tensors[name] for name in base.tensors if not facts.keys() & _names_before_dots(name)}
        return others | {name: _packed(base, name, *found) for name, found in facts.items()}

    def check(self, base: Base, config: Config) -> None:
        quant = config.quant
        given = {"quant.type": quant.type, "quant.block_size": quant.block_size, "quant.double": quant.double}
        packed = {name: weight for name, weight in base.weights.items() if isinstance(weight, PackedTensor)}
        for name, weight in packed.items():
            stored = (weight.quant_type, weight.block_size, weight.double)
            for (setting, asked), value in zip(given.items(), stored, strict=True):
                if value != asked:
                    raise ConfigError(
                        f"{setting}: {str(asked).lower()}, but {name} is stored with {str(value).lower()} in"
                        f" {base.name}, which is loaded as it is. Set {setting}: {str(value).lower()}."
                    )
            if weight.made_of != _DTYPES[config.model.dtype]:
                raise ConfigError(
                    f"model.base: {name} was {weight.made_of} before it was quantized, and would be rounded twice as"
                    f" {config.model.dtype} (model.dtype) in {base.name}. Give the 16-bit model; quant.type"
                    " quantizes it."
                )


class BitsAndBytes8bit(StoredFormat):
    """Linear layers in 8-bit integers, LLM.int8(). All other weights are as in a plain base.

    Beside `weight` of I8 there is `SCB`, the largest value of each row, which 127 represents. Values are fp32: the
    integer times SCB, times fp32's 1/127, as bitsandbytes dequantizes them."""

    readable: ClassVar[str] = "8 bits by bitsandbytes"
    unmergeable: ClassVar[str | None] = "stored in 8 bits by bitsandbytes, where no merged weight fits"

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == "bitsandbytes" and bool(quantization.get("load_in_8bit"))

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        from trainer.base.stored.shared.coded import Coded

        last_reads, found = LastReads(), dict[str, StoredTensor](base.tensors)
        for name, source in base.tensors.items():
            path, _, leaf = name.rpartition(".")
            if leaf != "weight" or source.dtype != "I8":
                continue
            scales = base.tensors.get(f"{path}.SCB")
            if scales is None or len(source.shape) != 2 or (scales.dtype, scales.shape) != ("F32", source.shape[:1]):
                raise ConfigError(
                    f"model.base: {path} is in 8 bits in {base.name}, and has no SCB with a number for each of its"
                    " rows. Copy the model again."
                )
            code = Code("int8", (1, source.shape[1]))
            found[name] = Coded(source, scales, source.shape, code, last_reads, "F32", then=_PART_OF_127)
            for part in ("SCB", "weight_format"):
                found.pop(f"{path}.{part}", None)
        return found


def _read_facts(base: Base) -> dict[str, tuple[dict[str, Any], bytes]]:
    """4-bit weight -> the JSON of its quant_state, and the bytes of its nested_quant_map (empty if it has none)."""
    states = {name.partition(_STATE)[0]: source for name, source in base.tensors.items() if _STATE in name}
    maps = {f"{name}.nested_quant_map" for name in states}
    wanted = states | {name: base.tensors[name] for name in sorted(maps & base.tensors.keys())}
    for name, source in wanted.items():
        if not 0 < numel(source) <= _MOST_NUMBERS:
            raise ConfigError(
                f"model.base: the quant_state of {name} in {base.name} has {numel(source)} numbers. Allowed are 1 to"
                f" {_MOST_NUMBERS}. Copy the model again."
            )
    read: dict[str, bytes] = {}
    for file in {source.key for source in wanted.values()}:
        inside = {name: source for name, source in wanted.items() if source.key == file}
        ranges = [source.byte_range(0, numel(source)) for source in inside.values()]
        parts = base.store.get_ranges(file, [begin for begin, _ in ranges], [end for _, end in ranges])
        read |= {name: bytes(part) for name, part in zip(inside, parts, strict=True)}
    return {name: (_parsed(base, name, read[name]), read.get(f"{name}.nested_quant_map", b"")) for name in states}


def _names_before_dots(name: str) -> set[str]:
    """`name`, and `name` without its last one or two parts: the weight to which an absmax or a quant_state belongs."""
    shorter = name.rpartition(".")[0]
    return {name, shorter, shorter.rpartition(".")[0]}


def _parsed(base: Base, name: str, data: bytes) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(data)
        if missing := {"quant_type", "blocksize", "dtype", "shape"} - state.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if not isinstance(state["shape"], list) or not isinstance(state.get("nested_offset", 0.0), float):
            raise ValueError("its shape is no list, or its nested_offset no number")
        if not all(type(number) is int and number > 0 for number in (*state["shape"], state["blocksize"])):
            raise ValueError("its shape or blocksize has numbers that are no sizes")
        return state
    except (*NOT_JSON, AttributeError) as error:
        raise ConfigError(
            f"model.base: the quant_state of {name} in {base.name} cannot be read ({error}). Copy the model again."
        ) from error


def _packed(base: Base, name: str, state: dict[str, Any], nested_map: bytes) -> PackedTensor:
    double = "nested_offset" in state
    standard = state.get("nested_blocksize") == _NESTED_BLOCK and hashlib.sha256(nested_map).hexdigest() == _NESTED_MAP
    if double and not standard:
        raise ConfigError(
            f"model.base: the scales of {name} in {base.name} are not stored as bitsandbytes stores them today. "
            "Give the 16-bit model; quant.type quantizes it."
        )
    weights = math.prod(state["shape"])
    blocks = math.ceil(weights / state["blocksize"])
    parts: dict[str, StoredTensor] = {"weight": _bytes(base, name, math.ceil(weights / 2))}
    parts["absmax"] = _bytes(base, f"{name}.absmax", blocks if double else 4 * blocks)
    if double:
        parts["nested_absmax"] = _bytes(base, f"{name}.nested_absmax", 4 * math.ceil(blocks / _NESTED_BLOCK))
    sources = PackedSources(parts, [state["nested_offset"]] if double else None)
    return PackedTensor(tuple(state["shape"]), sources, state["quant_type"], state["blocksize"], state["dtype"])


def _bytes(base: Base, name: str, size: int) -> TensorSource:
    """The tensor `name` of any type, as `size` bytes, which it must have."""
    source = base.tensors.get(name)
    there = 0 if source is None else numel(source) * DTYPE_BYTES[source.dtype]
    if source is None or there != size:
        raise ConfigError(
            f"model.base: {name} has {there} bytes in {base.name}, {size} by its quant_state. Copy the model again."
        )
    return TensorSource(source.store, source.key, "U8", (size,), source.offset)


STORED: dict[str, type[StoredFormat]] = {"bitsandbytes": BitsAndBytes4bit, "bitsandbytes in 8 bits": BitsAndBytes8bit}
