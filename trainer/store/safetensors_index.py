"""Tensor name -> file, dtype, shape and byte range, read from the headers of safetensors files.

Format: https://github.com/huggingface/safetensors#format: 8 bytes little-endian header length, a JSON header, the data.
Headers are checked against the sizes of the files, so a truncated file or a wrong header is found before any weight is
read.
"""

import hashlib
import json
import math
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from trainer.errors import NOT_JSON, ConfigError, NotFound, shown
from trainer.store.store import Store

_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
DTYPE_BYTES = {**_FLOAT_BYTES, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
WEIGHT_DTYPES = ("BF16", "F16", "F32")
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_HEADERS_AT_ONCE = 16
# Most headers are shorter, so that one request reads all of them.
_HEADER_GUESS = 128 * 2**10


class StoredTensor(Protocol):
    """A tensor that can be read in parts. `dtype` is the name that safetensors uses."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, begin: int, end: int) -> bytearray:
        """Return the bytes of elements [begin, end) of the flattened tensor.

        Only these bytes are read from the store.
        """
        ...


def item_bytes(source: StoredTensor) -> int:
    """The bytes of one element."""
    return DTYPE_BYTES[source.dtype]


def numel(source: StoredTensor) -> int:
    """The number of elements of the whole tensor."""
    return math.prod(source.shape)


@dataclass(frozen=True)
class TensorSource:
    """One tensor in one file. `offset` is the position of its first byte in the file."""

    store: Store
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def byte_range(self, begin: int, end: int) -> tuple[int, int]:
        """Return the range of bytes in the file that holds elements [begin, end) of the flattened tensor."""
        size = DTYPE_BYTES[self.dtype]
        return self.offset + size * begin, self.offset + size * end

    def read(self, begin: int, end: int) -> bytearray:
        return self.store.get_range(self.key, *self.byte_range(begin, end))


def as_bytes(source: TensorSource) -> TensorSource:
    """Return the same tensor as bytes, whatever its type."""
    return TensorSource(source.store, source.key, "U8", (numel(source) * item_bytes(source),), source.offset)


@dataclass(frozen=True)
class Stretch:
    """A stretch of `numel` elements of the part number `part`, beginning at the part's element `begin`."""

    part: int
    begin: int
    numel: int


@dataclass(frozen=True)
class Joined:
    """Stretches of other tensors of one dtype, joined in order into one tensor of `shape`.

    It stands for the experts of a mixture that the files hold singly, or for one of several projections that the files
    hold as one.
    """

    parts: tuple[StoredTensor, ...]
    stretches: tuple[Stretch, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @cached_property
    def starts(self) -> list[int]:
        """The element of this tensor at which each stretch begins."""
        return [0, *accumulate(stretch.numel for stretch in self.stretches)][:-1]

    def read(self, begin: int, end: int) -> bytearray:
        data = bytearray()
        for part, first, last in _merged(self._within(begin, end)):
            data += part.read(first, last)
        return data

    def _within(self, begin: int, end: int) -> Iterator[tuple[StoredTensor, int, int]]:
        """Yield the ranges of the parts that make up elements [begin, end)."""
        first = max(0, bisect_right(self.starts, begin) - 1)
        for stretch, start in zip(self.stretches[first:], self.starts[first:], strict=True):
            if start >= end:
                break
            here, there = max(begin - start, 0), min(end - start, stretch.numel)
            if here < there:
                yield self.parts[stretch.part], stretch.begin + here, stretch.begin + there


def _merged(ranges: Iterable[tuple[StoredTensor, int, int]]) -> Iterator[tuple[StoredTensor, int, int]]:
    """Yield the ranges, with those that follow each other in a file as one: as bytes, and read by one request."""
    before: tuple[StoredTensor, int, int] | None = None
    for one in ranges:
        if before is None:
            before = one
            continue
        joined = _one_range(before, one)
        if joined is None:
            yield before
        before = joined or one
    if before is not None:
        yield before


def _one_range(
    one: tuple[StoredTensor, int, int], other: tuple[StoredTensor, int, int]
) -> tuple[StoredTensor, int, int] | None:
    """Two ranges as one range of bytes, if the second follows the first in a file. None otherwise."""
    (first, *span), (second, *next_span) = one, other
    if not (isinstance(first, TensorSource) and isinstance(second, TensorSource) and first.key == second.key):
        return None
    (begin, end), (start, stop) = first.byte_range(*span), second.byte_range(*next_span)
    if end != start or first.store is not second.store:
        return None
    return TensorSource(first.store, first.key, "U8", (stop - begin,), begin), 0, stop - begin


@dataclass(frozen=True)
class PackedSources:
    """The packed weights of one module, in files that store them packed.

    `parts` are all read as bytes. Their names are those of a module that holds the weight. Under double quantization
    `mean` is the mean of absmax, one for each slice.
    """

    parts: dict[str, StoredTensor]
    mean: list[float] | None


@dataclass(frozen=True)
class PackedTensor:
    """A weight of `shape` that the files hold in 4 bits.

    Its values have the type `made_of` (torch's name) and lie in blocks of `block_size`.
    """

    shape: tuple[int, ...]
    sources: PackedSources
    quant_type: str
    block_size: int
    made_of: str
    dtype: str = "4-bit"

    @property
    def double(self) -> bool:
        """Whether the scales themselves are in 8 bits."""
        return self.sources.mean is not None


class FileHeader(NamedTuple):
    """The header of a file of `size` bytes: the SHA-256 of its bytes, and the tensors by name."""

    size: int
    sha256: str
    tensors: dict[str, TensorSource]


class HeaderText(NamedTuple):
    """The bytes of the JSON header of a file of `size` bytes."""

    size: int
    text: bytes


def read_headers(store: Store, texts: Mapping[str, HeaderText] | None = None) -> dict[str, FileHeader]:
    """Read the header of each file of a Hugging Face model directory, single-file or indexed, by the file's name.

    `texts` has the headers' bytes if they have been read.

    Raises:
        ConfigError: there is no safetensors file, or none with a name that transformers knows; a file that the index
            names is missing or truncated; a header is damaged; a tensor is in two files.
    """
    texts = read_header_texts(store) if texts is None else texts
    headers = {key: _parse_header(store, key, *text) for key, text in texts.items()}
    _check_no_tensor_is_in_two(store, headers)
    return headers


def read_header_texts(store: Store) -> dict[str, HeaderText]:
    """Read the bytes of all headers, by the file's name. Raises as `read_headers`."""
    sizes = {
        entry.key: entry.size for entry in store.list() if entry.key.endswith(".safetensors") and "/" not in entry.key
    }
    if not sizes:
        raise ConfigError(
            f"model.base: {store.uri} holds no *.safetensors file. Convert the model with save_pretrained(), which"
            " writes them."
        )
    # Without an index there is one file. Some repositories keep the same weights beside it in another layout.
    indexed = _indexed_files(store)
    if not indexed and SINGLE_FILE not in sizes:
        raise ConfigError(
            f"model.base: {store.uri} holds {min(sizes)}, but neither {SINGLE_FILE} nor {INDEX_FILE}, where"
            f" transformers looks. Rename a single file to {SINGLE_FILE}, or convert the model with save_pretrained()."
        )
    files = indexed or {SINGLE_FILE}
    missing = sorted(files - set(sizes))
    if missing:
        raise ConfigError(
            f"model.base: {store.uri}/{INDEX_FILE} names {missing[0]}, which is not there. Copy the model again."
        )
    if indexed and SINGLE_FILE in sizes and SINGLE_FILE not in indexed:
        raise ConfigError(
            f"model.base: {store.uri} holds {SINGLE_FILE} beside {INDEX_FILE}, which names other files: transformers"
            " would read the first, and others what the index names. Remove the one that is not meant."
        )
    names = sorted(files)
    with ThreadPoolExecutor(_HEADERS_AT_ONCE, "headers") as pool:
        texts = pool.map(lambda key: HeaderText(sizes[key], _read_header_text(store, key, sizes[key])), names)
        return dict(zip(names, texts, strict=True))


def _check_no_tensor_is_in_two(store: Store, headers: Mapping[str, FileHeader]) -> None:
    found = dict[str, str]()
    for file, header in headers.items():
        if both := found.keys() & header.tensors.keys():
            name = min(both)
            raise ConfigError(
                f"model.base: {store.uri} holds {shown(name)} in two files, {found[name]} and {file}, of which programs"
                " read one or the other. Write the model again with save_pretrained()."
            )
        found |= dict.fromkeys(header.tensors, file)


def _indexed_files(store: Store) -> set[str] | None:
    try:
        files = set(json.loads(store.get(INDEX_FILE))["weight_map"].values())
        if not all(isinstance(file, str) for file in files):
            raise TypeError
        return files
    except NotFound:
        return None
    except (*NOT_JSON, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"model.base: {store.uri}/{INDEX_FILE} is not a safetensors index. Copy the model again."
        ) from error


def read_header(store: Store, key: str, file_size: int) -> dict[str, TensorSource]:
    """Read the tensors of one safetensors file. Raises as `read_file_header`."""
    return read_file_header(store, key, file_size).tensors


def read_file_header(store: Store, key: str, file_size: int) -> FileHeader:
    """Read the header of one safetensors file of `file_size` bytes.

    Raises `ConfigError` when the sizes of its tensors do not add up.
    """
    return _parse_header(store, key, file_size, _read_header_text(store, key, file_size))


def _read_header_text(store: Store, key: str, file_size: int) -> bytes:
    where = f"{store.uri}/{key}"
    if file_size < 8:
        raise ConfigError(f"{where} is truncated: {file_size} bytes are no safetensors file. Copy it again.")
    start = store.get_range(key, 0, min(file_size, _HEADER_GUESS))
    (length,) = struct.unpack("<Q", start[:8])
    if length > min(_MAX_HEADER_BYTES, file_size - 8):
        raise ConfigError(
            f"{where} is damaged: its header claims {length} bytes of a file of {file_size}. Copy it again."
        )
    end = 8 + length
    return bytes(start[8:end] + store.get_range(key, len(start), end) if len(start) < end else start[8:end])


def _parse_header(store: Store, key: str, file_size: int, text: bytes) -> FileHeader:
    begin = 8 + len(text)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _source(store, key, begin, info, file_size) for name, info in header.items()}
        _check_no_byte_is_shared(tensors, begin, file_size)
        return FileHeader(file_size, hashlib.sha256(text).hexdigest(), tensors)
    except (*NOT_JSON, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{store.uri}/{key} is damaged: its header cannot be read ({error}). Copy it again."
        ) from error


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """Return the bytes before the data of a file with this `header`.

    They are padded as the format's own writer pads them, so that the data begins at a multiple of 8.
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def header_of(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> bytes:
    """Return the bytes before the data of a file whose tensors (name, dtype, shape) follow each other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        begin, position = position, position + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, position]}
    return header_bytes(header)


def _source(store: Store, key: str, data_start: int, info: dict[str, Any], file_size: int) -> TensorSource:
    begin, end = info["data_offsets"]
    shape, dtype = tuple(info["shape"]), info["dtype"]
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {shown(dtype)} is not supported")
    if not all(type(number) is int for number in (begin, end, *shape)) or min(shape, default=0) < 0:
        raise ValueError(f"shape {shown(shape)} and bytes {shown(begin)} to {shown(end)} are no sizes")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype] or begin < 0:
        raise ValueError(f"shape {list(shape)} of {dtype} does not fill bytes {begin} to {end}")
    if data_start + end > file_size:
        raise ValueError(f"it ends at byte {data_start + end}, the file at {file_size}")
    return TensorSource(store, key, dtype, shape, data_start + begin)


def _check_no_byte_is_shared(tensors: dict[str, TensorSource], data_start: int, file_size: int) -> None:
    """Raise `ValueError` unless the tensors follow each other and fill the file, as the format demands."""
    sizes = {name: numel(source) * item_bytes(source) for name, source in tensors.items()}
    expected = data_start
    for name in sorted(tensors, key=lambda name: (tensors[name].offset, sizes[name])):
        if tensors[name].offset != expected:
            raise ValueError(f"{shown(name)} begins at byte {tensors[name].offset}, and not at byte {expected}")
        expected += sizes[name]
    if expected != file_size:
        raise ValueError(f"its tensors end at byte {expected}, the file at {file_size}")
