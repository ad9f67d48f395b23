"""Which ranks may share a row, and how they share the heads of its layers. No torch."""

from math import gcd
from typing import NamedTuple


class Exchange(NamedTuple):
    """The exchange of ranks that share a row around one function of a layer's `heads`, or channels: `values` a token,
    and `grouped` ones that `groups` of heads share, which are as often there as ranks need them."""

    heads: int
    values: int
    groups: int
    grouped: int


def copies_of_keys(heads: int, kv_heads: int, size: int) -> int:
    """How often each head of keys is there, so that `size` ranks have as many each, beside the heads of queries that
    they are for; `size` divides `heads`. Each copy serves as many heads of queries as every other."""
    fewest = size // gcd(kv_heads, size)
    return next(
        times for times in range(fewest, heads + 1) if not (kv_heads * times % size or heads % (kv_heads * times))
    )


def uneven_ranks(size: int, world_size: int, ranks_per_node: int) -> str | None:
    """Why these ranks cannot share rows, `size` ranks each, in a sentence; None if they can."""
    per_node = min(world_size, ranks_per_node)
    if world_size % size:
        return (
            f"sharding.sequence_parallel: {size} ranks share each row, and {world_size} ranks are no multiple of"
            f" {size}. Change cluster.workers, or set a divisor of {world_size}."
        )
    if per_node % size:
        return (
            f"sharding.sequence_parallel: the {size} ranks that share a row must be on one node, and {per_node} ranks"
            f" of a node are no multiple of {size}. Set a divisor of {per_node}."
        )
    return None
