"""Converts floating-point numbers of 4, 8 and 16 bits, which numpy does not know, to fp32 and back.

E8M0 is that of the OCP Microscaling specification 1.0 (section 5.4.1); trainer/model/held/codes.py has the others.
numpy decodes here instead of torch because it is twice as fast on one thread, and several threads read at once.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trainer.model.held.codes import VALUES, Numbers

# Numbers that each reading thread decodes at once. Their fp32 values stay in a core's cache.
DECODED_AT_ONCE = 2**14
Floats = NDArray[np.float32]


def _e8m0() -> Floats:
    """The power of two that each byte represents, (256,)."""
    powers = np.ldexp(np.float32(1), np.arange(255, dtype=np.int32) - 127)
    return np.append(powers, np.float32(np.nan))


TABLES: dict[Numbers, Floats] = {numbers: np.array(values, np.float32) for numbers, values in VALUES.items()}
E2M1, E4M3, E8M0 = TABLES["e2m1"], TABLES["e4m3"], _e8m0()
# The types in which scales are stored, by safetensors' names. U8 also holds exponents, from writers whose torch had no
# type for them.
SCALES: dict[str, Callable[[bytearray | memoryview], Floats]] = {
    "F32": lambda data: np.frombuffer(data, np.float32),
    "F16": lambda data: np.frombuffer(data, np.float16).astype(np.float32),
    "BF16": lambda data: (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32),
    "F8_E8M0": lambda data: E8M0[np.frombuffer(data, np.uint8)],
    "F8_E4M3": lambda data: E4M3[np.frombuffer(data, np.uint8)],
    "U8": lambda data: E8M0[np.frombuffer(data, np.uint8)],
}


def round_to_bf16(values: Floats, out: NDArray[np.uint16]) -> None:
    """Write `values` to `out` as the bits of bf16, rounded to the nearest, ties to even. `values` are overwritten."""
    bits = values.view(np.uint32)
    bits += (bits >> 16 & 1) + np.uint32(0x7FFF)
    bits >>= 16
    out[:] = bits


def write_as(values: Floats, dtype: str, data: bytearray | NDArray[np.uint8], at: int = 0) -> None:
    """Write `values` to `data`, after its first `at` values, in a type of 16 or 32 bits. `values` are overwritten.

    `dtype` is safetensors' name of the type.
    """
    places = slice(at, at + len(values))
    if dtype == "BF16":
        round_to_bf16(values, np.frombuffer(data, np.uint16)[places])
    else:
        np.frombuffer(data, np.float16 if dtype == "F16" else np.float32)[places] = values
