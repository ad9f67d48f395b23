"""Memory of a rank's machine that outlives the rank, for the one that is started in its place.

`Shares` has the rank's share of the frozen base: the partitions lie in it, so a load writes there, and the next rank
finds it filled. `Updates` has what learns after each of the last two updates. A sum over their words tells whether what
is found is what was left. All is in files in memory without a name (`memfd_create`), which a keeper
(`launcher.start.keeper`) holds open.
"""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.run.segments import Tail

_LINE = 64
"""Bytes at whose multiples each partition begins."""
_PAGE = mmap.PAGESIZE
BLOCK = 2**12
"""Bytes whose words `block_sums` adds up together."""
_COPIED_AT_ONCE = 2**22
_HEADER = struct.Struct("<QI")  # the length of the facts that follow, and their CRC-32


def words_sum(part: Tensor) -> int:
    """Return the sum of words of eight bytes of `part` (bytes, uint8) and of the bytes that are left."""
    words = len(part) // 8 * 8
    return int(part[:words].view(torch.int64).sum() + part[words:].sum(dtype=torch.int64))


def placed_sum(part: Tensor, begin: int = 0) -> Tensor:
    """Return the sum of words of eight bytes of `part`, the bytes from `begin` on of something larger, as () int64.

    The sums of all parts add up to that of the whole, modulo 2**64, wherever it is cut. One wrong bit changes the sum.
    """
    data = part.reshape(-1).view(torch.uint8)
    head = min(-begin % 8, len(data))
    total = data.new_zeros((), dtype=torch.int64)
    body = data[head : len(data) - (len(data) - head) % 8]
    for chunk in body.split(_COPIED_AT_ONCE if body.storage_offset() % 8 else len(body) or 1):
        aligned = chunk.clone() if chunk.storage_offset() % 8 else chunk
        total += aligned.view(torch.int64).sum()
    for edge, place in ((data[:head], begin), (data[head + len(body) :], 0)):
        if len(edge):
            shifts = 8 * ((torch.arange(len(edge), device=data.device) + place) % 8)
            total += (edge.long() << shifts).sum()
    return total


def block_sums(data: Tensor) -> Tensor:
    """Return the sums of words of each `BLOCK` bytes of `data` (bytes, uint8) in turn, as (blocks,) int64."""
    whole = len(data) // BLOCK * BLOCK
    aligned = data.storage_offset() % 8 == 0
    sums = [
        (part if aligned else part.clone()).view(torch.int64).view(-1, BLOCK // 8).sum(1)
        for part in (data[:whole].split(whole if aligned else _COPIED_AT_ONCE) if whole else ())
    ]
    if whole < len(data):
        sums.append(placed_sum(data[whole:]).reshape(1))
    return torch.cat(sums) if len(sums) > 1 else sums[0]


class Shares:
    """The memory of one rank's partitions, in the order in which they are made."""

    def __init__(self, memory: int, facts: int) -> None:
        self._memory, self._facts = memory, facts
        self._bytes: Tensor | None = None
        self._end = 0

    def room(self, made: Tensor) -> Tensor:
        """Return the memory in which the partition `made`, on the CPU, is to lie from now on, with what is there."""
        size = made.numel() * made.element_size()
        begin, self._end = self._end, self._end + -(-size // _LINE) * _LINE
        return self._mapped()[begin : begin + size].view(made.dtype).view(made.shape)

    def begin(self) -> None:
        """Give room from the beginning again: what was given before is not used any more."""
        self._end = 0

    def forget(self) -> None:
        """Empty the memory, before other partitions lie in it."""
        self._bytes = None
        os.ftruncate(self._facts, 0)
        os.ftruncate(self._memory, 0)

    def keep(self, key: str, means: dict[str, list[float]]) -> None:
        """Say that the partitions are filled. `means` are those of the scales of the packed weights, by module."""
        assert self._bytes is not None
        facts = {"key": key, "bytes": self._end, "sum": words_sum(self._bytes[: self._end]), "means": means}
        _write_facts(self._facts, facts)

    def found(self, key: str) -> dict[str, list[float]] | None:
        """Return the `means` if the memory has the partitions of `key`, as they were left; else None."""
        facts = _read_facts(self._facts)
        if facts is None or facts["key"] != key or words_sum(self._mapped()[: facts["bytes"]]) != facts["sum"]:
            return None
        return facts["means"]

    def _mapped(self) -> Tensor:
        if self._bytes is None:
            # A file in memory takes the pages that are written to, and no others, so it is as large as the machine's.
            size = os.sysconf("SC_PHYS_PAGES") * _PAGE
            os.ftruncate(self._memory, size)
            self._bytes = torch.frombuffer(mmap.mmap(self._memory, size), dtype=torch.uint8)
        return self._bytes


class Updates:
    """The learnt state of one rank after each of the last two updates. Each has a slot, whose facts are written last.

    A rank that is killed while it writes leaves the other slot, and no rank is two updates ahead of another.
    """

    source = "memory"

    def __init__(self, file: int) -> None:
        self._file = file
        self._bytes: Tensor | None = None

    def arrived(self) -> None:
        """An update is there when `keep` returns."""

    def keep(self, step: int, facts: dict[str, Any], size: int, copy: Callable[[Tensor], object]) -> None:
        """Have `copy` write the state after `step` updates, of `size` bytes, to the memory that it is given."""
        if self._bytes is None:
            self._bytes = self._mapped(2 * (_PAGE + -(-size // _PAGE) * _PAGE))
        stride = len(self._bytes) // 2
        slot = self._bytes[step % 2 * stride :][:stride]
        slot[: _HEADER.size] = 0  # nothing is there while it is written
        body = slot[_PAGE : _PAGE + size]
        copy(body)
        text = json.dumps({**facts, "step": step, "size": size, "sum": words_sum(body)}).encode()
        assert _HEADER.size + len(text) <= _PAGE
        slot[_HEADER.size : _HEADER.size + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        slot[: _HEADER.size] = torch.frombuffer(bytearray(_header(text)), dtype=torch.uint8)

    def found(self) -> dict[int, tuple[dict[str, Any], Tensor]]:
        """Return the facts and the state after each update that is there as it was left, by step."""
        size = os.fstat(self._file).st_size
        if not size:
            return {}
        self._bytes = self._mapped(size)
        whole = dict[int, tuple[dict[str, Any], Tensor]]()
        for slot in self._bytes.split(size // 2):
            if (found := self._whole(slot)) is not None:
                whole[found[0]["step"]] = found
        return whole

    def is_sound(self, step: int) -> bool:
        """Return whether the state after `step` updates, the last that was kept, is there as it was left."""
        assert self._bytes is not None
        stride = len(self._bytes) // 2
        found = self._whole(self._bytes[step % 2 * stride :][:stride])
        return found is not None and found[0]["step"] == step

    def sent_again(self) -> int:
        """Return how often a copy elsewhere was wrong and was sent again since the last call: there are none."""
        return 0

    def go_on_from(self, step: int | None) -> None:
        """Keep the state after `step` updates alone. The updates that follow it are made again, perhaps otherwise."""
        for slot in [] if self._bytes is None else self._bytes.split(len(self._bytes) // 2):
            facts = self._facts(slot)
            if facts is not None and facts["step"] != step:
                slot[: _HEADER.size] = 0

    def _whole(self, slot: Tensor) -> tuple[dict[str, Any], Tensor] | None:
        if (facts := self._facts(slot)) is None:
            return None
        body = slot[_PAGE : _PAGE + facts["size"]]
        return (facts, body) if words_sum(body) == facts["sum"] else None

    @staticmethod
    def _facts(slot: Tensor) -> dict[str, Any] | None:
        return _facts_of(slot[:_PAGE].numpy().tobytes())

    def _mapped(self, size: int) -> Tensor:
        os.ftruncate(self._file, size)
        return torch.frombuffer(mmap.mmap(self._file, size), dtype=torch.uint8)


class Address(NamedTuple):
    """Where the holder of a machine listens, and the secret of those who may talk to it."""

    host: str
    port: int
    secret: bytes


class LastUpdates(Protocol):
    """The memory of what a rank has learnt after each of the last two updates. `source` is where it was found."""

    @property
    def source(self) -> str: ...

    def keep(self, step: int, facts: dict[str, Any], size: int, copy: Callable[[Tensor], object]) -> None:
        """Have `copy` write the state after `step` updates, of `size` bytes, to the memory that it is given."""
        ...

    def arrived(self) -> None:
        """Return when the last update is wherever it is kept."""
        ...

    def found(self) -> dict[int, tuple[dict[str, Any], Tensor]]:
        """Return the facts and the state after each update that is there as it was left, by step."""
        ...

    def is_sound(self, step: int) -> bool:
        """Return whether the state after `step` updates, the last that was kept, is there as it was left."""
        ...

    def sent_again(self) -> int:
        """Return how often a copy elsewhere was wrong and was sent again since the last call."""
        ...

    def go_on_from(self, step: int | None) -> None:
        """Keep the state after `step` updates alone. The updates that follow it are made again, perhaps otherwise."""
        ...


@dataclass(frozen=True)
class Kept:
    """The memory that one rank leaves for the one that is started in its place. `records` are rank 0's.

    `holder` is where this machine has copies for ranks of other machines (`trainer.state.neighbour`), if it has any.
    """

    shares: Shares
    updates: LastUpdates
    records: Tail
    holder: Address | None = None
    _files: tuple[int, ...] = ()

    @classmethod
    def made(cls, name: str, holder: Address | None = None) -> "Kept":
        """Return new, empty memory. It is there for this process and for those that it forks."""
        shares, facts, updates, records = (
            os.memfd_create(f"{name}: {what}") for what in ("shares", "facts", "updates", "records")
        )
        return cls(Shares(shares, facts), Updates(updates), Tail(records), holder, (shares, facts, updates, records))

    def close(self) -> None:
        """Give the memory back, as far as no rank uses it."""
        for file in self._files:
            os.close(file)


def _header(text: bytes) -> bytes:
    return _HEADER.pack(len(text), zlib.crc32(text))


def _facts_of(data: bytes) -> dict[str, Any] | None:
    """Return the facts that `data` begins with; None if there are none, or if they are not as they were left."""
    if len(data) < _HEADER.size:
        return None
    length, sum_ = _HEADER.unpack_from(data)
    text = data[_HEADER.size : _HEADER.size + length]
    return json.loads(text) if length and len(text) == length and zlib.crc32(text) == sum_ else None


def _write_facts(file: int, facts: dict[str, Any]) -> None:
    data = json.dumps(facts).encode()
    os.ftruncate(file, 0)
    os.pwrite(file, data, _HEADER.size)
    os.pwrite(file, _header(data), 0)  # last, as a rank that is killed meanwhile must leave nothing


def _read_facts(file: int) -> dict[str, Any] | None:
    return _facts_of(os.pread(file, os.fstat(file).st_size, 0))
