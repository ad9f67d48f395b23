"""Pinned memory of the host, as PyTorch takes it. No torch."""

_ALIGNED = 64  # bytes; any type of values may begin there


def pinned(size: int) -> int:
    """Bytes of a block of pinned memory of this size. PyTorch rounds each up to a power of two
    (ATen/core/CachingHostAllocator.h).
    """
    return 2 ** (size - 1).bit_length() if size else 0


def place_bytes(size: int) -> int:
    """Bytes of a place for a tensor of this size among others in one block."""
    return -(-size // _ALIGNED) * _ALIGNED


def blocks(size: int, count: int) -> list[int]:
    """The numbers of places in each block, for `count` places of this size such that rounding takes the least
    memory.
    """
    ways = ([each] * (count // each) + [count % each] * bool(count % each) for each in range(1, count + 1))
    return min(ways, key=lambda way: sum(pinned(places * size) for places in way), default=[])
