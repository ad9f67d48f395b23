"""From a parsed config.json to what it says: the architecture, and the format of the files."""

from typing import Any

from trainer.base.base import Description
from trainer.base.families import read_architecture
from trainer.base.plain import Plain
from trainer.base.prequantized import BitsAndBytes4bit
from trainer.errors import ConfigError


def describe(base_config: dict[str, Any], layers: int | None = None, *, name: str = "the base") -> Description:
    """Read the parsed config.json of the base that messages call `name`; `layers` cuts it to its first so many.

    Raises:
        ConfigError: it is of a family or in a format that is not supported, or a size is missing.
    """
    architecture = read_architecture(base_config, layers, name=name)
    quantization = base_config.get("quantization_config")
    if not quantization:
        return Description(architecture, Plain())
    if BitsAndBytes4bit.stores(quantization):
        return Description(architecture, BitsAndBytes4bit(quantization))
    raise ConfigError(
        f"model.base: {name} is quantized already, and not to 4 bits by bitsandbytes. Give the 16-bit model; quant.type "
        "quantizes it."
    )
