"""GPUs by name: their memory, and the products that they compute in a second. No torch, no driver."""

import difflib
import math
import re
from dataclasses import dataclass

from trainer.errors import ConfigError, shown

_MOST_GIB = 1e6

# Name -> memory in MiB, as the driver reports it for such a card (with ECC on, if the card has it), and TFLOP/s of
# dense bf16 products with fp32 sums, as in the maker's data sheet without sparsity. Of cards with one name the smaller
# comes first. Cards before Ampere, such as V100 and T4, have no bf16.
_GPUS: dict[str, tuple[int, float | None]] = {
    "H100": (81559, 989),
    "H100 PCIe": (81559, 756),
    "H100 NVL": (95830, 835),
    "H200": (143771, 989),
    "H200 NVL": (143771, 835),
    "H800": (81559, 989),
    "H20": (97871, 148),
    "GH200": (97871, 989),
    "B200": (183359, 2250),
    "GB200": (189471, 2500),
    "B300": (275040, 2250),
    "GB300": (284208, 2500),
    "A100 40GB": (40960, 312),
    "A100 80GB": (81920, 312),
    "A800 80GB": (81920, 312),
    "A40": (46068, 150),
    "A30": (24576, 165),
    "A10": (23028, 125),
    "A10G": (23028, None),
    "L4": (23034, 121),
    "L40": (46068, 181),
    "L40S": (46068, 362),
    "RTX A6000": (49140, 155),
    "RTX A5000": (24564, 111),
    "RTX 6000 Ada": (49140, 364),
    "RTX 5090": (32607, 210),
    "RTX 4090": (24564, 165),
    "RTX 4080": (16376, 97),
    "RTX 3090": (24576, 71),
    "MI250X": (65520, 383),
    "MI300X": (196592, 1307),
    "MI325X": (262128, 1307),
    "MI355X": (294896, 2300),
}
_DIGIT = re.compile(r"\d")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB|TiB|TB)?", re.IGNORECASE)
_UNITS = {"gib": 2**30, "g": 2**30, "": 2**30, "gb": 1e9, "mib": 2**20, "mb": 1e6, "tib": 2**40, "tb": 1e12}
# Words of a device's name that do not identify the card.
_IDLE_WORDS = frozenset(
    "nvidia amd instinct geforce tesla gpu generation hbm2 hbm2e hbm3 hbm3e sxm sxm2 sxm4 sxm5".split()
)
# The names of these cards contain the name of a faster one.
_LESSER = frozenset(("d", "laptop", "max", "mig", "super", "ti"))


@dataclass(frozen=True)
class Gpu:
    """A GPU: its memory in bytes, and the peak of its bf16 products in operations a second, if they are known."""

    name: str
    memory: int
    flops: float | None = None


def names() -> list[str]:
    """The known GPUs, each as one word."""
    return [name.replace(" ", "-") for name in _GPUS]


def find_gpu(name: str) -> Gpu | None:
    """The GPU with a device's name, such as "NVIDIA H100 80GB HBM3", or with a name that a person uses; None for an
    unknown one.

    All words of a card's name in the table have to be in `name`, and of several such cards the longest counts. A person
    may also leave words out: A100 is the one of 40 GB, and 4090 an RTX 4090.
    """
    words = _words(name)
    if words & _LESSER:
        return None
    known = {known: _words(known) for known in _GPUS}
    named = [known for known, own in known.items() if own <= words]
    short = [known for known, own in known.items() if words <= own] if any(map(_DIGIT.search, words)) else []
    found = max(named, key=lambda known: len(_words(known)), default=short[0] if short else None)
    if found is None:
        return None
    mebibytes, teraflops = _GPUS[found]
    return Gpu(found, mebibytes * 2**20, teraflops and teraflops * 1e12)


def read_gpu(text: str, option: str) -> Gpu:
    """The GPU that a person gives by a size, such as 80GiB, 24GB or 80, which is in GiB, or by its name.

    Raises:
        ConfigError: it is neither; `option` is what the message calls it.
    """
    size = _SIZE.fullmatch(text.strip())
    found = None if size and size[2] else find_gpu(text)  # 4090 is not a size of memory
    if size and not found:
        memory = float(size[1]) * _UNITS[(size[2] or "").lower()]
        if not 0 < memory <= _MOST_GIB * 2**30:
            raise ConfigError(f"{option}: {text} is no memory that a GPU has. Example: 80GiB.")
        return Gpu("", math.floor(memory))
    if found:
        return found
    close = difflib.get_close_matches(text.upper(), [name.upper() for name in _GPUS], n=1)
    near = next((f"Did you mean {name}? " for name in _GPUS if [name.upper()] == close), "")
    raise ConfigError(
        f"{option}: {shown(text)} is no GPU that is known here. {near}Give its memory, such as 24GB or 80GiB, or one of"
        f" {', '.join(_GPUS)}."
    )


def _words(name: str) -> frozenset[str]:
    spaced = re.sub(r"^rtx(?=\d)", "rtx ", name.strip().lower())
    # A100-40G and A100 40GiB are what makers call A100 40GB.
    words = (re.sub(r"^(\d+)gi?b?$", r"\1gb", word) for word in re.findall(r"[a-z0-9]+", spaced))
    return frozenset(words) - _IDLE_WORDS
