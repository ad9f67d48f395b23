"""A base in fewer bits as the plain base that it stands for: the same weights by the same names, in the decoded types.

Nothing is written: the plain files are laid out in memory. When a range of one is read, it is decoded from the base's
own file. So an export of a whole model, which edits a base's files as they pass, needs to know no stored format.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate

from trainer.base.base import Base
from trainer.base.describe.description import without_quantization
from trainer.base.find.small_files import with_config
from trainer.base.stored.plain import PlainFiles
from trainer.errors import NotFound
from trainer.store.safetensors_index import (
    INDEX_FILE,
    SINGLE_FILE,
    PackedTensor,
    StoredTensor,
    header_of,
    item_bytes,
    numel,
)
from trainer.store.store import Entry, Store

_FILE_BYTES = 5 * 10**9  # the size at which transformers splits models


def as_plain(base: Base) -> Base:
    """Return `base`, or the plain base that one in fewer bits stands for."""
    if not base.stored.decoded:
        return base
    config = without_quantization(base.config)
    description = replace(base.description, stored=PlainFiles({}))
    store, directory = _DecodedFiles(base), with_config(base.directory, config)
    return replace(base, directory=directory, store=store, config=config, description=description)


@dataclass(frozen=True)
class _File:
    """A safetensors file: its header, and the weights behind it. Each weight begins at its byte in `starts`."""

    header: bytes
    starts: list[int]
    weights: list[StoredTensor]

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.starts[-1] + _bytes_of(self.weights[-1])

    def read(self, start: int, end: int) -> bytearray:
        data, first = bytearray(self.header[start:end]), max(0, bisect_right(self.starts, start) - 1)
        for begin, weight in zip(self.starts[first:], self.weights[first:], strict=True):
            item, here, there = item_bytes(weight), max(start - begin, 0), min(end - begin, _bytes_of(weight))
            if here < there:
                element = here // item
                values = weight.read(element, -(-there // item))
                data += memoryview(values)[here - element * item : there - element * item]
        return data


class _DecodedFiles(Store):
    """The folder of these files. It can only be read."""

    def __init__(self, base: Base) -> None:
        super().__init__(base.store.uri, None)
        groups = list(_groups({name: _readable(weight) for name, weight in sorted(base.weights.items())}))
        names = [f"model-{n + 1:05}-of-{len(groups):05}.safetensors" for n in range(len(groups))]
        if len(groups) == 1:
            names = [SINGLE_FILE]
        self._files = {name: _laid_out(group) for name, group in zip(names, groups, strict=True)}
        self._weight_map = {weight: name for name, group in zip(names, groups, strict=True) for weight in group}

    def list(self, prefix: str = "") -> list[Entry]:
        return [Entry(name, file.size, datetime.fromtimestamp(0, UTC), "") for name, file in self._files.items()]

    def get(self, key: str) -> bytes:
        if key != INDEX_FILE or len(self._files) == 1:
            raise NotFound(f"{self.uri}/{key} does not exist.")
        return json.dumps({"weight_map": self._weight_map}).encode()

    def get_range(self, key: str, start: int, end: int) -> bytearray:
        return self._files[key].read(start, end)


def _readable(weight: StoredTensor | PackedTensor) -> StoredTensor:
    assert not isinstance(weight, PackedTensor), "a format that is decoded packs nothing"
    return weight


def _groups(weights: Mapping[str, StoredTensor]) -> Iterator[dict[str, StoredTensor]]:
    """Yield the weights in groups of at most `_FILE_BYTES`; a larger weight is a group of its own."""
    group, size = dict[str, StoredTensor](), 0
    for name, weight in weights.items():
        if group and size + _bytes_of(weight) > _FILE_BYTES:
            yield group
            group, size = {}, 0
        group[name], size = weight, size + _bytes_of(weight)
    yield group


def _laid_out(weights: Mapping[str, StoredTensor]) -> _File:
    header = header_of((name, weight.dtype, weight.shape) for name, weight in weights.items())
    starts = accumulate(map(_bytes_of, weights.values()), initial=len(header))
    return _File(header, list(starts)[:-1], list(weights.values()))


def _bytes_of(weight: StoredTensor) -> int:
    return numel(weight) * item_bytes(weight)
