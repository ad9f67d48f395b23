"""The row of documents that a model computes, and its documents of like length together, as rows of batches.

row:      a a a a b b b b b c
batch:    a a a a +             a layer that knows no borders computes documents of like length as rows of a batch,
          b b b b b             "+" being tokens whose results are dropped, and the longer ones before the shorter:
          c                     it is causal, so no token sees what lies behind it

Ranks may share a row: each has a slice of its tokens, or some heads of all of its tokens. DeepSpeed-Ulysses' exchange
(arXiv:2309.14509):

    rank 0   all heads of tokens 0, 1  --to heads-->  heads 0, 1 of all tokens  --to tokens-->  all heads of tokens 0, 1
    rank 1   all heads of tokens 2, 3                 heads 2, 3 of all tokens                  all heads of tokens 2, 3
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.masking_utils import and_masks, packed_sequence_mask_function

from trainer.processes.accelerator import onto


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


# A batch has no document shorter than this part of its longest one.
_LIKE = 3 / 4


def batches(lengths: list[int]) -> list[list[int]]:
    """Documents of like length together, as their numbers: the tokens of all batches are at most 4/3 of the
    documents'.
    """
    found: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
        if found and lengths[document] >= _LIKE * lengths[found[-1][0]]:
            found[-1].append(document)
        else:
            found.append([document])
    return found


class Documents:
    """The documents of one row, by their `lengths`. Where these are not known beforehand, they are read off its
    position_ids (1, T), which restart in each document, and asking for more than `numbers` waits for a GPU. With
    `peers` the positions are those of this rank's slice, and the lengths, which must be known, those of the whole row
    that they share. `prefixes` are as in `lengths_known`. Layers that `are_told` the documents need no mask;
    the row is `unmasked` once one was left out."""

    def __init__(self, position_ids: Tensor, known: "_Known", are_told: bool = False) -> None:
        assert (known.peers is None and not known.prefixes) or known.lengths is not None
        self._position_ids, self._lengths = position_ids, known.lengths
        self.peers, self.prefixes = known.peers, known.prefixes
        self.are_told, self.unmasked = are_told, False

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return torch.bincount(self._counted[0]).tolist() if self._lengths is None else list(self._lengths)

    @cached_property
    def numbers(self) -> Tensor | None:
        """The number of each token's document, (1, T); None if the row is one document."""
        return None if len(self.lengths) == 1 else self._counted

    @cached_property
    def positions(self) -> Tensor:
        """The position_ids of the whole row, (1, T)."""
        return self._position_ids if self.peers is None else self._from_lengths

    @cached_property
    def _from_lengths(self) -> Tensor:
        begins = [tokens for _, tokens in self.prefixes] or [0] * len(self.lengths)
        every = [torch.arange(begin, begin + length) for begin, length in zip(begins, self.lengths, strict=True)]
        return onto(torch.cat(every)[None], self._position_ids.device)

    @property
    def undivided(self) -> "Documents":
        """The same row on one rank, which has all of its tokens."""
        return Documents(self.positions, _Known(tuple(self.lengths)))

    @cached_property
    def places(self) -> Tensor:
        """The place of each token in its document, (1, T), which begins with its prefix."""
        return self.positions if self._lengths is None else self._from_lengths

    def masked(self, mask_function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of transformers' masks, with the borders of the row's documents; there are several. It is asked
        with places in the row. If a document goes on from a prefix, its queries ask for the prefix's keys from the
        places that they would have directly behind it.
        """
        assert self.numbers is not None
        own = packed_sequence_mask_function(self.numbers)
        if not self.prefixes:
            return and_masks(mask_function, own)
        begins = list(itertools.accumulate(self.lengths, initial=0))[:-1]
        first, behind, moved = (
            onto(torch.tensor(places).repeat_interleave(torch.tensor(self.lengths)), self.numbers.device)
            for places in zip(
                *(
                    (begin, begin + tokens, place - (begin + tokens))
                    for place, (begin, tokens) in zip(begins, self.prefixes, strict=True)
                ),
                strict=True,
            )
        )

        def own_or_prefix(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            in_prefix = (kv_idx >= first[q_idx]) & (kv_idx < behind[q_idx])
            place = torch.where(in_prefix, q_idx - moved[q_idx], q_idx)
            is_seen = own(batch_idx, head_idx, q_idx, kv_idx) | in_prefix
            return mask_function(batch_idx, head_idx, place, kv_idx) & is_seen

        return own_or_prefix

    @cached_property
    def _counted(self) -> Tensor:
        if self._lengths is not None:
            sizes = torch.tensor(self._lengths)
            return onto(torch.arange(len(sizes)).repeat_interleave(sizes)[None], self._position_ids.device)
        positions = self.positions
        return (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)

    @cached_property
    def batches(self) -> "_Batches":
        """All documents, as rows of batches."""
        lengths, device = self.lengths, self._position_ids.device
        begins = list(itertools.accumulate(lengths, initial=0))
        places, back, tokens = list[Tensor](), torch.empty(begins[-1], dtype=torch.int64), 0
        for batch in batches(lengths):
            longest = lengths[batch[0]]
            rows = torch.tensor([begins[document] for document in batch])[:, None] + torch.arange(longest)
            last = torch.tensor([begins[document + 1] - 1 for document in batch])[:, None]
            places.append(onto(rows.minimum(last), device))
            for row, document in enumerate(batch):
                first = tokens + row * longest
                back[begins[document] : begins[document + 1]] = first + torch.arange(lengths[document])
            tokens += rows.numel()
        return _Batches(places, onto(back, device))


@dataclass(frozen=True)
class _Batches:
    """`places`: for each batch (documents, longest) the tokens of the row, the last one repeated where a document is
    shorter. `back`: (T,) where each token of the row is in all batches' tokens, one batch behind the other."""

    places: list[Tensor]
    back: Tensor


_ROW: ContextVar[Documents | None] = ContextVar("row", default=None)
Prefixes = Sequence[tuple[int, int]]
"""The prefix that each document of a row goes on from: the place of its first token in the row, and its tokens, 0 for
none. Empty where no document has one."""


@dataclass(frozen=True)
class _Known:
    """The arguments of `lengths_known`."""

    lengths: tuple[int, ...] | None = None
    peers: Peers | None = None
    prefixes: Prefixes = ()


_NOTHING = _Known()
_KNOWN: ContextVar[_Known] = ContextVar("known", default=_NOTHING)


@contextmanager
def lengths_known(lengths: tuple[int, ...], peers: Peers | None = None, prefixes: Prefixes = ()) -> Iterator[None]:
    """Inside, a model computes a row whose documents have so many tokens each; with `peers` this rank's slice of it. A
    document may go on from one of `prefixes`, whose tokens lie before it in the row; its positions do."""
    before = _KNOWN.set(_Known(lengths, peers, prefixes))
    try:
        yield
    finally:
        _KNOWN.reset(before)


def set_documents_apart(tokens: int) -> None:
    """The first `tokens` of each document of the row that is about to be computed are a document of their own."""
    known = _KNOWN.get()
    if known.lengths is not None:
        assert not known.prefixes
        parts = ((min(length, tokens), length - tokens) for length in known.lengths)
        _KNOWN.set(replace(known, lengths=tuple(part for pair in parts for part in pair if part > 0)))


class CannotDivide(Exception):
    """A layer cannot compute for a slice of a row, or for documents that share a prefix; the text says why, as a
    clause.
    """


class AtWork(AbstractContextManager[None]):
    """Inside, layers compute for `documents`."""

    def __init__(self, documents: Documents | None) -> None:
        self._documents, self._before = documents, list[Token[Documents | None]]()

    def __enter__(self) -> None:
        self._before.append(_ROW.set(self._documents))

    def __exit__(self, *_error: object) -> None:
        _ROW.reset(self._before.pop())


def row_at_work() -> Documents | None:
    """The row that layers compute for, if it has positions."""
    return _ROW.get()


def described(position_ids: Tensor, are_told: bool) -> Documents:
    """The row with such positions, and with what is known of it."""
    return Documents(position_ids, _KNOWN.get(), are_told)


def by_documents(
    row: Documents | None, compute: Callable[..., Any], arguments: Sequence[Any], given: dict[str, Any]
) -> Any:
    """`compute` for each batch of documents of a row: the states that it returns, or that are the first it returns, of
    all tokens of the row.

    Anything else that it returns belongs to a batch, and nothing asks for it. It is left out of a row with one document
    too, as ZeRO-3 counts the tensors that a layer returns, and all ranks must count alike.
    """
    if row is None or row.numbers is None:
        results = [compute(*arguments, **given)]
    else:
        with AtWork(None):
            results = [
                compute(*_taken(tuple(arguments), places, row), **_taken(given, places, row))
                for places in row.batches.places
            ]
    states = [result if isinstance(result, Tensor) else result[0] for result in results]
    joined = states[0] if row is None or row.numbers is None else _joined(states, row)
    return joined if isinstance(results[0], Tensor) else (joined, *(None for _ in results[0][1:]))


def _taken(value: Any, places: Tensor, row: Documents) -> Any:
    """The part of an argument that belongs to the tokens at `places` (documents, longest): of states (1, T, ...) and of
    masks (1, heads, T, T), alone or in tuples and dictionaries. Anything else stays as it is."""
    if isinstance(value, tuple):
        return tuple(_taken(part, places, row) for part in value)
    if isinstance(value, dict):
        return {name: _taken(part, places, row) for name, part in value.items()}
    tokens = len(row.batches.back)
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != 1:
        return value
    if value.ndim == 4 and value.shape[2:] == (tokens, tokens):
        taken = value[0][:, places[:, :, None], places[:, None, :]].transpose(0, 1)
        ahead = torch.ones(taken.shape[2:], dtype=torch.bool, device=taken.device).triu(
            1
        )  # the last token's repetitions
        return taken.masked_fill(ahead, False if taken.dtype == torch.bool else torch.finfo(taken.dtype).min)
    if value.shape[1] == tokens:
        return value[0].index_select(0, places.flatten()).unflatten(0, places.shape)
    return value


def _joined(results: list[Tensor], row: Documents) -> Tensor:
    """The results of all batches, each (documents, longest, H), as the row's: (1, T, H)."""
    return torch.cat([result.flatten(0, 1) for result in results]).index_select(0, row.batches.back)[None]


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
