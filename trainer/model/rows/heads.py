"""How the heads of a layer are shared by ranks that share a row. No torch."""

from math import gcd
from typing import NamedTuple


class Exchange(NamedTuple):
    """The exchange of ranks that share a row around one function of a layer's `heads`, or channels: `values` a token, and `grouped` ones that `groups`
    of heads share, which are as often there as ranks need them."""

    heads: int
    values: int
    groups: int
    grouped: int


def copies_of_keys(heads: int, kv_heads: int, size: int) -> int:
    """How often each head of keys is there, so that `size` ranks have as many each, beside the heads of queries that they are for; `size` divides
    `heads`. Each copy serves as many heads of queries as every other."""
    fewest = size // gcd(kv_heads, size)
    return next(
        times for times in range(fewest, heads + 1) if not (kv_heads * times % size or heads % (kv_heads * times))
    )
