"""From a parsed config.json to what it says: the architecture, and the format of the files."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from trainer.base.base import Base, Description, StoredFormat
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.unrecognised import unrecognised
from trainer.base.stored.fp8 import Fp8
from trainer.base.stored.mxfp4 import Mxfp4
from trainer.base.stored.prequantized import BitsAndBytes4bit
from trainer.config import Config
from trainer.errors import ConfigError, shown
from trainer.files.safetensors_index import StoredTensor


class Plain:
    """Bases stored as they compute, in 16 or 32 bits: every weight is a tensor, which is quantized on the way into memory, if at all."""

    unmergeable: ClassVar[str | None] = None
    quantized: ClassVar[bool] = False
    decoded: ClassVar[bool] = False

    def mismatches(self, config: Config) -> list[str]:
        return []

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        return base.tensors

    def check(self, base: Base, config: Config) -> None:
        pass


class _Quantized(Protocol):
    """A format that a quantization_config tells of."""

    def __call__(self, quantization: dict[str, Any]) -> StoredFormat: ...
    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool: ...


_FORMATS: tuple[_Quantized, ...] = (BitsAndBytes4bit, Fp8, Mxfp4)
# The keys of a quantization_config that tell kinds of one method apart.
_KINDS = ("quant_algo", "format", "expert_dtype", "load_in_8bit", "bits")


def describe(base_config: dict[str, Any], layers: int | None = None, *, name: str = "the base") -> Description:
    """Read the parsed config.json of the base that messages call `name`; `layers` cuts it to its first so many.

    Raises:
        ConfigError: it is of a kind or in a format that is not supported.
    """
    architecture = read_architecture(base_config, layers, name=name)
    stored = _stored(base_config.get("quantization_config"), name)
    return Description(architecture, stored, tuple(unrecognised(base_config, architecture)))


def _stored(quantization: dict[str, Any] | None, name: str) -> StoredFormat:
    if not quantization:
        return Plain()
    for stored in _FORMATS:
        if stored.stores(quantization):
            return stored(quantization)
    kinds = [f"{key} {shown(quantization[key])}" for key in _KINDS if quantization.get(key)]
    details = f" ({', '.join(kinds)})" if kinds else ""
    raise ConfigError(
        f"model.base: {name} is stored by {shown(quantization.get('quant_method'))}{details}, which cannot be read. Readable are "
        "16 and 32 bits, FP8 with scales for tiles, MXFP4, and 4 bits by bitsandbytes. Give the 16-bit model; quant.type quantizes it."
    )
