"""Finds texts that are equal or nearly so, in one pass.

Near duplicates are found by MinHash (Broder 1997) over all 8-byte sequences of the text, after case and white space are
normalised. The share of the 60 minima in which two texts agree estimates the Jaccard similarity of their sequences.
Texts that agree in all six minima of one of ten bands are compared, which finds about 95 % of the pairs with a
similarity of 0.8.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.data.order.order import splitmix64

SIMILAR = 0.8
_BANDS, _ROWS = 10, 6
_HASHES = _BANDS * _ROWS
_SHINGLE = 8
_CHUNK = 2**14
# One multiply-and-shift hash function each (Dietzfelbinger et al. 1997): odd factors, any summands.
_FACTORS = splitmix64(np.arange(_HASHES, dtype=np.uint64)) | np.uint64(1)
_SUMMANDS = splitmix64(np.arange(_HASHES, 2 * _HASHES, dtype=np.uint64))


@dataclass(frozen=True)
class Fingerprint:
    """A text: `exact` is a digest of it, `minima` (60,) uint32 its MinHash signature."""

    exact: bytes
    minima: NDArray[np.uint32]

    @classmethod
    def of(cls, text: str) -> "Fingerprint":
        even = " ".join(text.lower().split()).encode("utf-8", "surrogatepass").ljust(_SHINGLE)
        shingles = np.lib.stride_tricks.sliding_window_view(np.frombuffer(even, np.uint8), _SHINGLE)
        minima = np.full(_HASHES, 2**32 - 1, np.uint32)
        for start in range(0, len(shingles), _CHUNK):
            words = np.ascontiguousarray(shingles[start : start + _CHUNK]).view("<u8")[:, 0].astype(np.uint64)
            hashes = (splitmix64(words)[None] * _FACTORS[:, None] + _SUMMANDS[:, None]) >> np.uint64(32)
            minima = np.minimum(minima, hashes.min(axis=1).astype(np.uint32))
        return cls(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), minima)

    def bands(self) -> list[tuple[int, bytes]]:
        return [(band, row.tobytes()) for band, row in enumerate(self.minima.reshape(_BANDS, _ROWS))]


class Seen:
    """The texts so far. Each takes about 1.5 kB of memory."""

    def __init__(self) -> None:
        self._exact: dict[bytes, str] = {}
        self._bands: dict[tuple[int, bytes], tuple[str, NDArray[np.uint32]]] = {}

    def find(self, text: Fingerprint) -> tuple[Literal["exact", "near"], str] | None:
        """Whether an earlier text equals this one or nearly so, and the place of that text; None if there is none."""
        if text.exact in self._exact:
            return "exact", self._exact[text.exact]
        for band in text.bands():
            where, minima = self._bands.get(band, ("", None))
            if minima is not None and np.count_nonzero(minima == text.minima) >= SIMILAR * _HASHES:
                return "near", where
        return None

    def add(self, text: Fingerprint, where: str) -> None:
        """Remember a text. The first of several texts that share a band stands for all of them."""
        self._exact.setdefault(text.exact, where)
        for band in text.bands():
            self._bands.setdefault(band, (where, text.minima))
