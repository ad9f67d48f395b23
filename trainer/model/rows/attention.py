"""Attention over a row that several ranks share, around the attention function that a layer calls, whichever it is.

A kernel sees a whole row with fewer heads, so that borders of documents, windows and caps are those of the whole row.
DeepSpeed's own wrapper (`UlyssesSPAttentionHF`) loses the borders of packed documents with SDPA.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.model.rows.heads import copies_of_keys
from trainer.model.rows.row import Documents, Peers, by_documents, to_heads, to_tokens


def attend_across(
    attend: Callable[..., tuple[Tensor, Any]],
    peers: Peers,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    s_aux: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """`attend`, a function of transformers' attention interface, for this rank's tokens of a row that it shares with
    `peers`.

    query (1, heads, T / size, head), key and value (1, kv_heads, T / size, ...), sinks `s_aux` (heads,) -> (1, T /
    size, heads, value_dim). The mask is the whole row's. Raises `ConfigError` if the heads cannot be divided evenly
    over the ranks.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % peers.size:
        raise ConfigError(
            f"sharding.sequence_parallel: {peers.size} ranks cannot share the {heads} heads of this base's attention"
            f" evenly. Set a divisor of {heads}."
        )
    times = copies_of_keys(heads, kv_heads, peers.size)
    query, key, value = (
        to_heads(part.transpose(1, 2), peers).transpose(1, 2)
        for part in (query, repeated(key, times, 1), repeated(value, times, 1))
    )
    if s_aux is not None:
        given["s_aux"] = s_aux.chunk(peers.size)[peers.part]
    layer = _OfRank(module, heads, kv_heads, peers)
    out, _ = attend(layer, query, key, value, attention_mask, **given)
    return to_tokens(out, peers), None


def attend_by_documents(
    attend: Callable[..., tuple[Tensor, Any]],
    row: Documents,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **given: Any,
) -> tuple[Tensor, Any]:
    """Call `attend` for each document of a row by itself if there is no mask. Each is causal, and sees only its own
    tokens and its prefix."""
    if attention_mask is not None:
        return attend(module, query, key, value, attention_mask, **given)

    def compute(*states: Tensor) -> Tensor:
        return attend(module, *(part.transpose(1, 2) for part in states), None, **given)[0]

    if not row.prefixes:
        return by_documents(row, compute, [part.transpose(1, 2) for part in (query, key, value)], {}), None
    results, begin = list[Tensor](), 0
    for length, (first, tokens) in zip(row.lengths, row.prefixes, strict=True):
        own, prefix = slice(begin, begin + length), slice(first, first + tokens)
        keys, values = (torch.cat([part[:, :, prefix], part[:, :, own]], dim=2) for part in (key, value))
        seen = causal(query[:, :, own], keys) if tokens else None
        results.append(attend(module, query[:, :, own], keys, values, seen, **given)[0])
        begin += length
    return torch.cat(results, dim=1), None


def causal(query: Tensor, key: Tensor) -> Tensor:
    """The mask (1, 1, T, K) of one document, whose tokens are the last of its keys; query (..., T, head), key (..., K,
    head).
    """
    tokens, keys = query.shape[-2], key.shape[-2]
    return torch.ones(1, 1, tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)


class _OfRank:
    """A layer's attention as a kernel asks it for facts, with this rank's heads: the heads of queries for each head of
    keys, and the part of what it has a value of for each head, such as sinks, or keys and values of for each head of
    keys, such as prefixes (2, kv_heads, P, head)."""

    def __init__(self, module: nn.Module, heads: int, kv_heads: int, peers: Peers) -> None:
        self._module, self._heads, self._kv_heads, self._peers = module, heads, kv_heads, peers
        self._copies = copies_of_keys(heads, kv_heads, peers.size)
        self.num_key_value_groups = heads // (kv_heads * self._copies)

    def __getattr__(self, name: str) -> Any:
        value, peers = getattr(self._module, name), self._peers
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 4 and value.shape[1] == self._kv_heads:
            return repeated(value, self._copies, 1).chunk(peers.size, dim=1)[peers.part]
        return value.chunk(peers.size)[peers.part] if value.shape == (self._heads,) else value


def repeated(heads: Tensor, times: int, dim: int) -> Tensor:
    return heads if times == 1 else heads.repeat_interleave(times, dim)
