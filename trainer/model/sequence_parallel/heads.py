"""How the heads of attention are shared by ranks that share a row. No torch."""

from math import gcd


def copies_of_keys(heads: int, kv_heads: int, size: int) -> int:
    """How often each head of keys is there, so that `size` ranks have as many each, beside the heads of queries that they are for; `size` divides
    `heads`. Each copy serves as many heads of queries as every other."""
    fewest = size // gcd(kv_heads, size)
    return next(
        times for times in range(fewest, heads + 1) if not (kv_heads * times % size or heads % (kv_heads * times))
    )
