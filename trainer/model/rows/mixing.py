"""Layers that mix tokens otherwise than by attention (Mamba, linear attention, convolutions), over a row that several
ranks share.

transformers' families call the same few functions there, by the same names in each family's module, and each computes
channels or heads that know nothing of one another. Around such a function a rank exchanges its tokens for some channels
or heads of all tokens, as around attention. A layer that mixes tokens in a way of its own has the whole row on each
rank.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor, nn

from trainer.model.rows.attention import repeated
from trainer.model.rows.heads import Exchange, copies_of_keys
from trainer.model.rows.row import (
    AtWork,
    Documents,
    Peers,
    by_documents,
    of_all_tokens,
    row_at_work,
    to_heads,
    to_tokens,
)

_CONVOLUTION = "causal_conv1d_fn"
# The functions over heads, and which of their arguments is as wide as the result.
_OVER_HEADS = {"mamba2_chunk_scan": 0, "torch_chunk_gated_delta_rule": 2, "chunk_kimi_delta_attention": 2}
# The functions that have another layout: whoever calls them has the whole row.
_OTHERS = {"mamba_selective_scan", "mamba_inner_fn"}


_SEEN: ContextVar[list[Exchange] | None] = ContextVar("seen", default=None)


def divides(mixer: nn.Module) -> bool:
    """Whether all that mixes tokens in a layer are functions around which ranks can exchange heads. These do so from
    now on.
    """
    forward = inspect.unwrap(type(mixer).forward)
    called = functions_of_module(forward)
    known = called.keys() & {_CONVOLUTION, *_OVER_HEADS}
    if not known or called.keys() & _OTHERS:
        return False
    # transformers has a registry for these functions, but only with the package kernels, which takes them from the
    # Hub. Without it a family's module is the only place where they can be exchanged.
    # tests/unit/model/test_upstream.py fails where a family calls them otherwise.
    for name in known:
        if not hasattr(called[name], "across_ranks"):
            setattr(sys.modules[forward.__module__], name, _across_ranks(name, called[name]))
    return True


def functions_of_module(forward: Callable[..., Any]) -> Mapping[str, Any]:
    """The functions, and whatever else, that a `forward` of transformers names of its module."""
    return inspect.getclosurevars(inspect.unwrap(forward)).globals


def exchanges(mixer: nn.Module, example: Tensor) -> tuple[Exchange, ...]:
    """The exchanges of ranks in a layer that calls known functions, found by use: the layer computes `example` (1,
    tokens, H), which may be on `meta`.
    """
    seen = list[Exchange]()
    before = _SEEN.set(seen)
    try:
        type(mixer).forward(mixer.eval(), example)
    finally:
        _SEEN.reset(before)
    return tuple(seen)


def on_whole_row(row: Documents, compute: Callable[..., Any], arguments: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """`compute` over the row's documents on each of the ranks that share it, and this rank's slice of the result."""
    assert row.peers is not None
    whole, peers = row.undivided, row.peers
    tokens = sum(row.lengths) // peers.size
    arguments, given = (_of_all(value, tokens, peers) for value in (arguments, given))
    with AtWork(whole):
        result = by_documents(whole, compute, arguments, given)
    if isinstance(result, Tensor):
        return result.chunk(peers.size, dim=1)[peers.part]
    return result[0].chunk(peers.size, dim=1)[peers.part], *result[1:]


def _of_all(value: Any, tokens: int, peers: Peers) -> Any:
    """Return an argument for all tokens of the row. It stays as it is unless it has a value for each of this rank's
    tokens."""
    if isinstance(value, tuple):
        return tuple(_of_all(part, tokens, peers) for part in value)
    if isinstance(value, dict):
        return {name: _of_all(part, tokens, peers) for name, part in value.items()}
    return of_all_tokens(value, peers) if _is_by_token(value, tokens) else value


def _is_by_token(value: Any, tokens: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == (1, tokens)


def _across_ranks(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def across_ranks(*arguments: Any, **given: Any) -> Any:
        row, seen = row_at_work(), _SEEN.get()
        if seen is None and (row is None or row.peers is None):
            return function(*arguments, **given)
        if name == _CONVOLUTION:
            return _convolve(function, row, seen, *arguments, **given)
        return _over_heads(function, row, seen, _OVER_HEADS[name], arguments, given)

    across_ranks.across_ranks = True  # type: ignore[attr-defined]
    return across_ranks


def _convolve(
    function: Callable[..., Any],
    row: Documents | None,
    seen: list[Exchange] | None,
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    **given: Any,
) -> Tensor:
    """A convolution of each channel by itself: states (1, channels, T / size), weight (channels, width)."""
    if seen is not None:
        seen.append(Exchange(states.shape[1], 2 * states.shape[1], 1, 0))
        return states
    assert row is not None
    assert row.peers is not None
    own = [None if part is None else part.chunk(row.peers.size)[row.peers.part] for part in (weight, bias)]

    def compute(states: Tensor) -> Tensor:
        return function(states.transpose(1, 2), *own, **given).transpose(1, 2)

    some = to_heads(states.transpose(1, 2), row.peers)
    return to_tokens(by_documents(row, compute, [some], {}), row.peers).transpose(1, 2)


def _over_heads(
    function: Callable[..., Any],
    row: Documents | None,
    seen: list[Exchange] | None,
    like: int,
    arguments: tuple[Any, ...],
    given: dict[str, Any],
) -> Any:
    """A function of states (1, T / size, heads, ...), some of which fewer groups of heads share, and of values for each
    head, (heads,).
    """
    tokens, heads = arguments[like].shape[1:3]
    if seen is not None:
        by_token = [value for value in (*arguments, *given.values()) if _is_by_token(value, tokens)]
        full = sum(value[0, 0].numel() for value in by_token if value.shape[2] == heads)
        shared = [value for value in by_token if value.shape[2] != heads]
        groups = shared[0].shape[2] if shared else 1
        seen.append(
            Exchange(heads, full + arguments[like][0, 0].numel(), groups, sum(value[0, 0].numel() for value in shared))
        )
        result = arguments[like]
    else:
        assert row is not None
        assert row.peers is not None
        peers = row.peers

        def own(value: Any) -> Any:
            if _is_by_token(value, tokens):
                return to_heads(repeated(value, copies_of_keys(heads, value.shape[2], peers.size), 2), peers)
            by_head = isinstance(value, Tensor) and value.shape == (heads,)
            return value.chunk(peers.size)[peers.part] if by_head else value

        some = [own(value) for value in arguments]
        result = by_documents(row, function, some, {name: own(value) for name, value in given.items()})
        if not isinstance(result, Tensor):
            result = result[0]
        result = to_tokens(result, peers)
    return result if like == 0 else (result, None)
