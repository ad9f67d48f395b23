"""One row over several ranks: each has a slice of its tokens in every layer, but in attention some heads of all of its tokens.

DeepSpeed-Ulysses' exchange (arXiv:2309.14509), here around the attention function that a layer calls, whichever it is:

    rank 0   all heads of tokens 0, 1    --queries, keys, values-->    heads 0, 1 of all tokens    --result-->    all heads of tokens 0, 1
    rank 1   all heads of tokens 2, 3                                  heads 2, 3 of all tokens                   all heads of tokens 2, 3

A kernel sees a whole row with fewer heads, so that borders of documents, windows and caps are those of the whole row. DeepSpeed's own wrapper
(`UlyssesSPAttentionHF`) loses the borders of packed documents with SDPA.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.model.sequence_parallel.heads import copies_of_keys


class Peers(Protocol):
    """The ranks that share a row, as one of them sees them: there are `size`, and it has the slice number `part`."""

    @property
    def size(self) -> int: ...
    @property
    def part(self) -> int: ...

    def swap(self, pieces: Tensor) -> Tensor:
        """pieces (size, ...) -> the same shape: piece i goes to peer i, piece j came from peer j. Collective among them."""
        ...

    def total(self, mine: Tensor) -> Tensor:
        """The sum over the peers. Collective among them."""
        ...


class RankPeers:
    """Peers that are ranks of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.size, self.part = group.size(), group.rank()

    def swap(self, pieces: Tensor) -> Tensor:
        received = torch.empty_like(pieces)
        dist.all_to_all_single(received, pieces, group=self._group)
        return received

    def total(self, mine: Tensor) -> Tensor:
        every = mine.clone()
        dist.all_reduce(every, group=self._group)
        return every


class _Total(torch.autograd.Function):
    """A value of which all peers then compute the same: each hands the gradient on to its own part."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, peers: Peers) -> Tensor:
        return peers.total(mine)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_output, None


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pieces: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return peers.swap(pieces)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.peers.swap(grad_output.contiguous()), None


def total(mine: Tensor, peers: Peers) -> Tensor:
    """The sum of `mine` over the peers, whose gradient is that of one of them."""
    result: Tensor = _Total.apply(mine, peers)  # type: ignore[assignment]
    return result


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
    """`attend`, a function of transformers' attention interface, for this rank's tokens of a row that it shares with `peers`.

    query (1, heads, T / size, head), key and value (1, kv_heads, T / size, ...), sinks `s_aux` (heads,) -> (1, T / size, heads, value_dim).
    The mask is the whole row's. Raises `ConfigError` where the ranks cannot have as many heads each.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % peers.size:
        raise ConfigError(
            f"sharding.sequence_parallel: {peers.size} ranks cannot share the {heads} heads of this base's attention evenly. Set a divisor of {heads}."
        )
    times = copies_of_keys(heads, kv_heads, peers.size)
    query, key, value = (_to_heads(part, peers) for part in (query, _repeated(key, times), _repeated(value, times)))
    if s_aux is not None:
        given["s_aux"] = s_aux.chunk(peers.size)[peers.part]
    layer = _OfRank(module, heads, query.shape[1] // key.shape[1], peers)
    out, _ = attend(layer, query, key, value, attention_mask, **given)
    return _to_tokens(out, peers), None


class _OfRank:
    """A layer's attention as a kernel asks it for facts, with this rank's heads: the heads of queries for each head of keys, and the part of what
    it has a value of for each head, such as sinks."""

    def __init__(self, module: nn.Module, heads: int, groups: int, peers: Peers) -> None:
        self._module, self._heads, self._peers, self.num_key_value_groups = module, heads, peers, groups

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        by_head = isinstance(value, Tensor) and value.shape == (self._heads,)
        return value.chunk(self._peers.size)[self._peers.part] if by_head else value


def _repeated(heads: Tensor, times: int) -> Tensor:
    return heads if times == 1 else heads.repeat_interleave(times, dim=1)


def _to_heads(mine: Tensor, peers: Peers) -> Tensor:
    """(1, heads, T / size, d), all heads of some tokens -> (1, heads / size, T, d), some heads of all tokens."""
    _, heads, tokens, width = mine.shape
    pieces: Tensor = _Swap.apply(mine.reshape(peers.size, heads // peers.size, tokens, width).contiguous(), peers)  # type: ignore[assignment]
    return pieces.transpose(0, 1).reshape(1, heads // peers.size, peers.size * tokens, width)


def _to_tokens(mine: Tensor, peers: Peers) -> Tensor:
    """(1, T, heads / size, d) -> (1, T / size, heads, d)."""
    _, tokens, heads, width = mine.shape
    pieces: Tensor = _Swap.apply(mine.reshape(peers.size, tokens // peers.size, heads, width).contiguous(), peers)  # type: ignore[assignment]
    return pieces.permute(1, 0, 2, 3).reshape(1, tokens // peers.size, peers.size * heads, width)
