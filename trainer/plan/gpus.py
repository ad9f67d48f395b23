"""GPUs by name: their memory, and the products that they can do in a second. No torch, no driver."""

import difflib
import math
import re
from dataclasses import dataclass

from trainer.errors import ConfigError, shown

_MOST_GIB = 1e6

# Name -> memory in MiB, as the driver reports it for such a card (with ECC on, if the card has it); TFLOP/s of dense
# products in bf16 with sums in fp32, without sparsity, and GB/s of its memory, from the maker's data sheet. Among cards
# of one name the smaller comes first. Cards before Ampere, such as V100 and T4, have no bf16.
_GPUS: dict[str, tuple[int, float | None, int]] = {
    "H100": (81559, 989, 3350),
    "H100 PCIe": (81559, 756, 2039),
    "H100 NVL": (95830, 835, 3938),
    "H200": (143771, 989, 4800),
    "H200 NVL": (143771, 835, 4800),
    "H800": (81559, 989, 3350),
    "H20": (97871, 148, 4000),
    "GH200": (97871, 989, 4000),
    "B200": (183359, 2250, 8000),
    "GB200": (189471, 2500, 8000),
    "B300": (275040, 2250, 8000),
    "GB300": (284208, 2500, 8000),
    "A100 40GB": (40960, 312, 1555),
    "A100 80GB": (81920, 312, 2039),
    "A800 80GB": (81920, 312, 2039),
    "A40": (46068, 150, 696),
    "A30": (24576, 165, 933),
    "A10": (23028, 125, 600),
    "A10G": (23028, None, 600),
    "L4": (23034, 121, 300),
    "L40": (46068, 181, 864),
    "L40S": (46068, 362, 864),
    "RTX A6000": (49140, 155, 768),
    "RTX A5000": (24564, 111, 768),
    "RTX 6000 Ada": (49140, 364, 960),
    "RTX 5090": (32607, 210, 1792),
    "RTX 4090": (24564, 165, 1008),
    "RTX 4080": (16376, 97, 717),
    "RTX 3090": (24576, 71, 936),
    "V100 16GB": (16384, None, 900),
    "V100 32GB": (32768, None, 900),
    "T4": (15360, None, 320),
    "MI250X": (65520, 383, 1638),
    "MI300X": (196592, 1307, 5300),
    "MI325X": (262128, 1307, 6000),
    "MI355X": (294896, 2300, 8000),
}
# Bytes a second that collectives reach within a node: 80 % of one direction of NVLink by the data sheet, or of PCIe 4.
_LINKS = (
    (frozenset(("B200", "GB200", "B300", "GB300")), 720e9),
    (frozenset(("H100", "H200", "H20", "GH200", "MI300X", "MI325X", "MI355X")), 360e9),
    (frozenset(("A100 40GB", "A100 80GB")), 240e9),
    (frozenset(("H800", "A800 80GB")), 160e9),
)
_PCIE = 25e9
_WITHOUT_BF16 = frozenset(("V100 16GB", "V100 32GB", "T4"))
_DIGIT = re.compile(r"\d")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB|TiB|TB)?", re.IGNORECASE)
_UNITS = {"gib": 2**30, "g": 2**30, "": 2**30, "gb": 1e9, "mib": 2**20, "mb": 1e6, "tib": 2**40, "tb": 1e12}
# These words of a device's name do not say which card it is.
_IDLE_WORDS = frozenset(
    "nvidia amd instinct geforce tesla gpu generation hbm2 hbm2e hbm3 hbm3e sxm sxm2 sxm4 sxm5".split()
)
# Cards with these words have the name of a faster card in theirs.
_LESSER = frozenset(("d", "laptop", "max", "mig", "super", "ti"))


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    It has the memory in bytes, the peak of products in bf16 in operations a second, and the peak of the memory in bytes
    a second, if they are known, and says whether the GPU has bf16. `link` is the bytes a second that it gets from other
    GPUs of its node.
    """

    name: str
    memory: int
    flops: float | None = None
    bandwidth: float | None = None
    bf16: bool = True
    link: float = _PCIE


def names() -> list[str]:
    """Return the GPUs that are known here, each as one word."""
    return [name.replace(" ", "-") for name in _GPUS]


def find_gpu(name: str) -> Gpu | None:
    """Find the GPU that a device's name, such as "NVIDIA H100 80GB HBM3", or a person means.

    None if it is not known here.

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
    mebibytes, teraflops, gigabytes = _GPUS[found]
    link = next((speed for cards, speed in _LINKS if found in cards), _PCIE)
    flops, bf16 = teraflops and teraflops * 1e12, found not in _WITHOUT_BF16
    return Gpu(found, mebibytes * 2**20, flops, gigabytes * 1e9, bf16, link)


def read_gpu(text: str, option: str) -> Gpu:
    """Return the GPU that a person gives by its name, or by a size such as 80GiB, 24GB or 80, which is in GiB.

    Raises:
        ConfigError: it is neither; `option` is what the message calls it.
    """
    size = _SIZE.fullmatch(text.strip())
    found = None if size and size[2] else find_gpu(text)  # 4090 is no size of memory
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
    # A100-40G and A100 40GiB are those that makers call A100 40GB.
    words = (re.sub(r"^(\d+)gi?b?$", r"\1gb", word) for word in re.findall(r"[a-z0-9]+", spaced))
    return frozenset(words) - _IDLE_WORDS
