"""A cheap fingerprint of a base's weights. It reads some MB in less than a second, for a base of any size.

For each file it covers the size, every byte of the header, and ranges of the weights at fixed places, each in another
tensor. Another base of the same shapes differs there, and so do a merge or another version of a file. A change between
the ranges is not noticed; `hash_whole` reads everything.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import NamedTuple

from trainer.store.safetensors_index import FileHeader, TensorSource, numel
from trainer.store.store import Store

SAMPLED_BYTES = 8 * 2**20
"""A base of at most so many bytes is hashed whole."""
_RANGES = 1024
_READS_AT_ONCE = 64
_FILES_AT_ONCE = 8
_DIGITS = 16


class _Range(NamedTuple):
    key: str
    begin: int
    end: int


def sample_weights(store: Store, headers: Mapping[str, FileHeader]) -> dict[str, str]:
    """Name -> 16 hex digits, for each file of weights."""
    digests = {key: hashlib.sha256(f"{header.size} {header.sha256}".encode()) for key, header in headers.items()}
    ranges = list(_places(headers))
    with ThreadPoolExecutor(_READS_AT_ONCE, "samples") as pool:
        for place, data in zip(ranges, pool.map(lambda place: store.get_range(*place), ranges), strict=True):
            digests[place.key].update(data)
    return {key: digest.hexdigest()[:_DIGITS] for key, digest in digests.items()}


def _places(headers: Mapping[str, FileHeader]) -> Iterator[_Range]:
    """Yield the ranges to read, the same at every call.

    They are the whole files of a small base, else a part of as many tensors as there are ranges.
    """
    stored = {key: list(header.tensors.values()) for key, header in headers.items()}
    if sum(_bytes_of(tensor) for tensors in stored.values() for tensor in tensors) <= SAMPLED_BYTES:
        for key, header in headers.items():
            begin = min((tensor.offset for tensor in header.tensors.values()), default=header.size)
            yield _Range(key, begin, header.size)
        return
    # Files take turns, so that each gets a sample. A hash of the names decides which tensors of a file come first.
    turns = zip_longest(*(sorted(header.tensors.items(), key=_drawn) for header in headers.values()))
    chosen = [entry for turn in turns for entry in turn if entry is not None][:_RANGES]
    size = SAMPLED_BYTES // len(chosen)
    for name, tensor in chosen:
        spare = max(0, _bytes_of(tensor) - size)
        begin = tensor.offset + (_drawn((name, tensor)) % (spare + 1))
        yield _Range(tensor.key, begin, begin + min(size, _bytes_of(tensor)))


def _drawn(entry: tuple[str, TensorSource]) -> int:
    return int.from_bytes(hashlib.sha256(entry[0].encode()).digest()[:8])


def _bytes_of(tensor: TensorSource) -> int:
    begin, end = tensor.byte_range(0, numel(tensor))
    return end - begin


def hash_whole(
    store: Store, headers: Mapping[str, FileHeader], report: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, str]:
    """Name -> SHA-256, for each file of weights. Reads every byte. `report` gets the bytes done and all bytes."""
    done, total = [0], sum(header.size for header in headers.values())

    def whole(key: str) -> str:
        digest = hashlib.sha256()
        for chunk in store.chunks(key, headers[key].size):
            digest.update(chunk)
            done[0] += len(chunk)
            report(done[0], total)
        return digest.hexdigest()

    with ThreadPoolExecutor(_FILES_AT_ONCE, "hashes") as pool:
        return dict(zip(headers, pool.map(whole, headers), strict=True))
