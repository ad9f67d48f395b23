"""Documents of one packed row stay apart in every layer that mixes tokens, whichever model transformers builds.

    row:      a a a a b b b b b c
    batch:    a a a a +             a layer that knows no borders computes documents of like length as rows of a batch,
              b b b b b             "+" being tokens whose results are dropped, and the longer ones before the shorter:
              c                     it is causal, so no token sees what lies behind it

A row may be divided over ranks (trainer/model/sequence_parallel/exchange.py): then attention, and its mask, is for all of the row's tokens, and every other
layer for this rank's slice of them.

A document may go on from a prefix that lies before it in the row, as several answers do that share their prompt (`data.share_prefix`):

    row:        p p p p a a a b b b    a is one document with the prefix p, and b goes on from p
    positions:  0 1 2 3 4 5 6 4 5 6    b sees p and itself, and none of a

Attention knows the borders from its mask or from cu_seqlens. transformers makes most masks from restarting position_ids, but
some models make theirs without: here every mask that is made for a row gets the borders. Any other layer that mixes tokens
(linear attention, a convolution, Mamba, attention that also compresses or picks keys) takes the documents apart, so that the
kernels that are installed for it need not know about borders.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    eager_mask,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sdpa_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.model.parts import body
from trainer.model.sequence_parallel.exchange import Peers, attend_across
from trainer.processes.accelerator import onto

# The names that layers of transformers have for what they keep of earlier tokens: whoever mixes tokens needs it to generate.
_CACHES = {"cache", "past_key_values", "past_key_value", "cache_params", "layer_past"}
# Arguments that speak of the whole row's borders, and mean nothing to a batch of documents.
_BORDERS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
# A batch has no document shorter than this part of its longest one.
_LIKE = 3 / 4


def batches(lengths: list[int]) -> list[list[int]]:
    """Documents of like length together, as their numbers: the tokens of all batches are at most 4/3 of the documents'."""
    found: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
        if found and lengths[document] >= _LIKE * lengths[found[-1][0]]:
            found[-1].append(document)
        else:
            found.append([document])
    return found


class Documents:
    """The documents of one row, from its position_ids (1, T), which restart in each of them. Where their `lengths` are not known
    beforehand, asking for more than `numbers` waits for a GPU. With `peers` the positions are those of this rank's slice, and the lengths, which
    must be known, those of the whole row that they share. `prefixes` are as in `lengths_known`."""

    def __init__(
        self,
        position_ids: Tensor,
        lengths: Sequence[int] | None = None,
        peers: Peers | None = None,
        prefixes: "Prefixes" = (),
    ) -> None:
        assert (peers is None and not prefixes) or lengths is not None
        self._position_ids, self._lengths, self.peers, self._prefixes = position_ids, lengths, peers, prefixes

    @property
    def masked_here(self) -> bool:
        """Whether transformers, which looks at the positions of a row, would make another mask than the row needs."""
        return self.peers is not None or bool(self._prefixes)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return torch.bincount(self._counted[0]).tolist() if self._lengths is None else list(self._lengths)

    @cached_property
    def numbers(self) -> Tensor | None:
        """The number of each token's document, (1, T); None where the row is one document."""
        return None if len(self.lengths) == 1 else self._counted

    @cached_property
    def positions(self) -> Tensor:
        """The position_ids of the whole row, (1, T)."""
        if self.peers is None:
            return self._position_ids
        begins = [tokens for _, tokens in self._prefixes] or [0] * len(self.lengths)
        every = [torch.arange(begin, begin + length) for begin, length in zip(begins, self.lengths, strict=True)]
        return onto(torch.cat(every)[None], self._position_ids.device)

    @cached_property
    def sees(self) -> Callable[..., Any]:
        """Whether a token may see another one as far as documents go, as a function of transformers' masks; there are several documents."""
        assert self.numbers is not None
        own = packed_sequence_mask_function(self.numbers)
        if not self._prefixes:
            return own
        sizes = torch.tensor(self.lengths)
        first, behind = (
            onto(torch.tensor(places).repeat_interleave(sizes), self.numbers.device)
            for places in zip(*((begin, begin + tokens) for begin, tokens in self._prefixes), strict=True)
        )

        def or_prefix(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
            in_prefix = (kv_idx >= first[q_idx]) & (kv_idx < behind[q_idx])
            return own(batch_idx, head_idx, q_idx, kv_idx) | in_prefix

        return or_prefix

    @cached_property
    def _counted(self) -> Tensor:
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
    """`places`: for each batch (documents, longest) the tokens of the row, the last one repeated where a document is shorter.
    `back`: (T,) where each token of the row is in all batches' tokens, one batch behind the other."""

    places: list[Tensor]
    back: Tensor


_ROW: ContextVar[Documents | None] = ContextVar("row", default=None)
Prefixes = Sequence[tuple[int, int]]
"""The prefix that each document of a row goes on from: the place of its first token in the row, and its tokens, 0 for none. Empty where no
document has one."""


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
    """Inside, a model computes a row whose documents have so many tokens each; with `peers` this rank's slice of it. A document may go on
    from one of `prefixes`, whose tokens lie before it in the row; its positions do."""
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
    """A layer cannot compute for a slice of a row, or for documents that share a prefix; the text says why, as a clause."""


class _RowAtWork(AbstractContextManager[None]):
    """Inside, layers compute for `documents`."""

    def __init__(self, documents: Documents | None) -> None:
        self._documents, self._before = documents, list[Token[Documents | None]]()

    def __enter__(self) -> None:
        self._before.append(_ROW.set(self._documents))

    def __exit__(self, *_error: object) -> None:
        _ROW.reset(self._before.pop())


def recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of activation checkpointing: a layer that is computed again in backward, by another thread and after
    other rows maybe, computes for the row that it did."""
    return nullcontext(), _RowAtWork(_ROW.get())


def keep_documents_apart(model: PreTrainedModel) -> None:
    """Have documents of a row not see each other in any layer of `model`, and attention exchange its heads with those that share the row."""
    masking_utils.find_packed_sequence_indices = _find_documents
    AttentionInterface.get_interface = _interface_of_row  # type: ignore[method-assign]
    AttentionMaskInterface.register("sdpa", sdpa_mask_of_row)
    AttentionMaskInterface.register("eager", of_row(eager_mask))
    decoder = body(model)
    decoder.forward = _for_row(decoder.forward)
    for mixer in mixers(model):
        if not knows_borders(mixer):
            mixer.forward = _in_batches(mixer, mixer.forward)


def mixers(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules inside a model's layers in which a token's result depends on other tokens: those that take a cache,
    as they could not generate without one, or have a convolution."""
    for child in model.children():
        if _mixes(child) and not any(isinstance(module, GradientCheckpointingLayer) for module in child.modules()):
            yield child
        else:
            yield from mixers(child)


def knows_borders(mixer: nn.Module) -> bool:
    """Whether tokens see each other only as a mask allows, or cu_seqlens: by an attention function of transformers' interface,
    which all read `is_causal` of their module, and by what picks keys for it under the same mask. Attention that scales queries
    without rotation by their place (Llama 4) counts tokens from the beginning of the row, whatever position_ids say."""
    if getattr(mixer, "attn_temperature_tuning", False) and not mixer.use_rope:
        return False
    if (attention := _normed_attention(mixer)) is not None:
        return knows_borders(attention)
    inside = (module for module in mixer.modules() if module is not mixer and _mixes(module))
    return hasattr(mixer, "is_causal") and all("attention_mask" in _arguments(module) for module in inside)


def _normed_attention(mixer: nn.Module) -> nn.Module | None:
    """The attention in a module that has norms beside it and nothing else that could mix tokens (DBRX); None for any other module."""
    mixing = [child for child in mixer.children() if _mixes(child)]
    others = [child for child in mixer.children() if child not in mixing]
    is_plain = all("norm" in type(child).__name__.lower() for child in others) and not convolves(mixer)
    return mixing[0] if others and is_plain and len(mixing) == 1 else None


def _mixes(module: nn.Module) -> bool:
    return convolves(module) or not _CACHES.isdisjoint(_arguments(module))


def convolves(module: nn.Module) -> bool:
    """Whether a convolution is among its own parts."""
    return any(isinstance(child, nn.Conv1d) for child in module.children())


def _arguments(module: nn.Module) -> Collection[str]:
    return inspect.signature(type(module).forward).parameters.keys()


_find_packed = masking_utils.find_packed_sequence_indices


def _find_documents(position_ids: Tensor) -> Tensor | None:
    """transformers looks for documents in position_ids whenever it makes a mask, and waits for the device. In a row they are known. The
    positions of a slice would be too few for its mask, and would hide a prefix: `of_row` does without."""
    row = _ROW.get()
    if row is None:
        return _find_packed(position_ids)
    return None if row.masked_here else row.numbers


_interface = AttentionInterface.get_interface


def _interface_of_row(known: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function that a layer is about to call, by which kernel soever: across the ranks that share the row, if some do."""
    attend, row = _interface(known, name, default), _ROW.get()
    return attend if row is None or row.peers is None else functools.partial(attend_across, attend, row.peers)


def of_row(make: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `make` of a mask, with the borders of the row's documents in it."""

    def mask(*, mask_function: Callable[..., Any] = causal_mask_function, **given: Any) -> Any:
        row = _ROW.get()
        if row is not None and row.masked_here:
            given["q_length"] = given["kv_length"] = sum(row.lengths)
            if row.numbers is not None:
                mask_function = remap_positions_for_packed_sequence(mask_function, row.positions)
        if row is not None and row.numbers is not None:
            mask_function = and_masks(mask_function, row.sees)
            given["allow_is_causal_skip"] = False
        return make(mask_function=mask_function, **given)

    return mask


sdpa_mask_of_row = of_row(sdpa_mask)


def _for_row(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a model's body, for the row that its position_ids describe. A body that takes none computes one document,
    with nothing but padding behind it."""
    taken = "position_ids" in inspect.signature(forward).parameters

    @functools.wraps(forward)
    def over_row(*arguments: Any, **given: Any) -> Any:
        positions = given.pop("position_ids", None)
        if positions is None or not taken:
            return forward(*arguments, **given)
        known = _KNOWN.get()
        with _RowAtWork(Documents(positions, known.lengths, known.peers, known.prefixes)):
            return forward(*arguments, position_ids=positions, **given)

    return over_row


def _in_batches(mixer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of `mixer`, for each batch of documents of a row."""

    @functools.wraps(forward)
    def in_batches(*arguments: Any, **given: Any) -> Any:
        row, given = _ROW.get(), {name: value for name, value in given.items() if name not in _BORDERS}
        if row is not None and row.masked_here:
            raise CannotDivide(f"its {type(mixer).__name__} mixes tokens by something else than plain attention")
        with _unfused(mixer):
            if row is None or row.numbers is None:
                results = [forward(*arguments, **given)]
            else:
                results = [
                    forward(*_taken(arguments, places, row), **_taken(given, places, row))
                    for places in row.batches.places
                ]
        states = [result if isinstance(result, Tensor) else result[0] for result in results]
        joined = states[0] if row is None or row.numbers is None else _joined(states, row)
        if isinstance(results[0], Tensor):
            return joined
        # Scores of attention belong to a batch, and nothing asks for them. They are left out of a row with one document too, as
        # ZeRO-3 counts the tensors that a layer returns, and all ranks must count alike.
        return joined, *(None for _ in results[0][1:])

    return in_batches


@contextmanager
def _unfused(mixer: nn.Module) -> Iterator[None]:
    """Inside, `mixer` calls its projections. A layer with a convolution whose own flag says that it trains hands the weights of its
    projections to one kernel of mamba-ssm, where that is installed; here they may be packed, or have adapters around them."""
    training = mixer.training
    mixer.training = training and not convolves(mixer)
    try:
        yield
    finally:
        mixer.training = training


def _taken(value: Any, places: Tensor, row: Documents) -> Any:
    """The part of an argument that belongs to the tokens at `places` (documents, longest): of states (1, T, ...) and of masks
    (1, heads, T, T), alone or in tuples and dictionaries. Anything else stays as it is."""
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
