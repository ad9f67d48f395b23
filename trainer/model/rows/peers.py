"""The ranks that share a row, and what they exchange: each has a slice of its tokens, or some heads of all of its
tokens.

DeepSpeed-Ulysses' exchange (arXiv:2309.14509):

    rank 0   all heads of tokens 0, 1  --to heads-->  heads 0, 1 of all tokens  --to tokens-->  all heads of tokens 0, 1
    rank 1   all heads of tokens 2, 3                 heads 2, 3 of all tokens                  all heads of tokens 2, 3
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Peers(Protocol):
    """The ranks that share a row, as one of them sees them: there are `size`, and it has the slice number `part`."""

    @property
    def size(self) -> int: ...
    @property
    def part(self) -> int: ...

    def swap(self, pieces: Tensor) -> Tensor:
        """pieces (size, ...) -> the same shape: piece i goes to peer i, piece j came from peer j. Collective among
        them.
        """
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


def to_heads(mine: Tensor, peers: Peers) -> Tensor:
    """All heads of this rank's tokens (1, T / size, heads, ...) -> its heads of all tokens (1, T, heads / size,
    ...).
    """
    pieces = mine[0].unflatten(1, (peers.size, -1)).transpose(0, 1)
    return _swapped(pieces, peers).flatten(0, 1)[None]


def to_tokens(mine: Tensor, peers: Peers) -> Tensor:
    """This rank's heads of all tokens (1, T, heads / size, ...) -> all heads of its tokens (1, T / size, heads,
    ...).
    """
    pieces = mine[0].unflatten(0, (peers.size, -1))
    return _swapped(pieces, peers).transpose(0, 1).flatten(1, 2)[None]


def of_all_tokens(mine: Tensor, peers: Peers) -> Tensor:
    """The values of this rank's tokens (1, T / size, ...) -> those of the row (1, T, ...), on each rank."""
    if mine.is_complex():
        return torch.view_as_complex(of_all_tokens(torch.view_as_real(mine), peers))
    return _swapped(mine.expand(peers.size, *mine.shape[1:]), peers).flatten(0, 1)[None]


def _swapped(pieces: Tensor, peers: Peers) -> Tensor:
    result: Tensor = _Swap.apply(pieces.contiguous(), peers)  # type: ignore[assignment]
    return result
