"""Measures what pictures cost a run before it begins: operations and activations of the tower, and time of the
host.

The real class is built on `meta`, and goes over a document with pictures as in a run, up to its decoder. A tensor on
`meta` has a shape and no values. Grids, masks and indices decide the shapes of what follows, so they are computed. If
the tower learns, autograd shows what it saves for the backward pass, as it would in a run.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoConfig, PretrainedConfig

from trainer.base.describe.empty_model import unfilled_whole
from trainer.base.describe.language_model import inner_of
from trainer.base.find.media import numbered
from trainer.base.find.processor import Processor, read_processor
from trainer.base.load.load import DTYPES
from trainer.base.unreadable import read_by_transformers
from trainer.model.front import Front
from trainer.model.kept import KeptBytes, kept_of
from trainer.model.micro_batch import Seen
from trainer.model.towers import AdaptedLayers, ChangedWeights, Lender, Lent

_TIMES, _LONG = 3, 1.0  # seconds
_META = torch.device("meta")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


def sight_costs(
    directory: str,
    name: str,
    sizes: Sequence[tuple[int, int]],
    learning: dict[str, Any] | None = None,
    modality: int = 0,
) -> list[dict[str, Any]]:
    """For a picture of each of `sizes` (height, width) the `tokens` that stand for it, the `operations` of the
    tower, and the `seconds` of one core of this machine, which reads a file and makes the class's inputs. `of` says
    what it is.

    The sizes may be those of files of another `modality`, by its number. If the base takes no such files, it is one of
    a usual size that the base does take.

    If the tower learns, `learning` says how (`Learning`). Then the operations include those of the backward pass,
    `repeated` those of the layers that are computed again in it, and `kept` has the bytes that are kept for it.

    `operations` and `kept` are None if the class does not compute on `meta`. Raises `ConfigError` as `read_processor`.
    """
    processor = read_processor(Path(directory), name)
    with read_by_transformers(name, "config.json"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    empty = Empty(config, learning)
    again = Empty(config, {**learning, "again": True}) if learning else None
    own = numbered(modality)
    shapes = [own.kept(*size) for size in sizes] if own in processor.takes else [processor.takes[0].usual]
    return [_cost(empty, again, processor, shape) for shape in shapes]


class _Looked(NamedTuple):
    """A document takes these operations and keeps these bytes, and so many of its `tokens` stand for pictures."""

    tokens: int
    operations: int
    kept: KeptBytes


def _by_tokens(
    few: _Looked, more: _Looked, size: Callable[[KeptBytes], int] = lambda kept: kept.bytes
) -> tuple[float, float]:
    """The bytes that are kept of any row, and those that come on top for each token."""
    of_token = (size(more.kept) - size(few.kept)) / (more.tokens - few.tokens)
    return size(few.kept) - of_token * few.tokens, of_token


def _cost(empty: "Empty", again: "Empty | None", processor: Processor, shape: Any) -> dict[str, Any]:
    modality, ids = shape.modality, processor.encode(processor.replacements((shape,))[0])
    kept, content = modality.kept(*modality.numbers(shape)), modality.example(shape, processor.made)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _time(lambda: processor.inputs([modality.shown(content, kept, processor.made)], ids))
    finally:
        torch.set_num_threads(threads)
    found: dict[str, Any] = {"tokens": len(ids), "operations": None, "seconds": seconds, "of": modality.title(shape)}
    try:
        one = empty.look(processor, [shape])
        learnt = {} if again is None else _learnt(empty, again, processor, shape)
    except Exception:  # a class may ask for a value that a tensor on `meta` has not, in any way
        return found
    return {**found, "operations": one.operations, **learnt}


def _learnt(empty: "Empty", again: "Empty", processor: Processor, shape: Any) -> dict[str, Any]:
    """Return the bytes that are kept for each token, by documents of two and of three pictures. A tensor of one picture
    may be a view where a tensor of several is none."""
    two, three, two_again, three_again = (
        part.look(processor, [shape] * count) for part in (empty, again) for count in (2, 3)
    )
    kept = {
        "plain": _by_tokens(two, three),
        "recomputed": _by_tokens(two_again, three_again),
        "layer": _by_tokens(two, three, lambda kept: kept.layer)[1],
        "largest": _by_tokens(two, three, lambda kept: kept.largest)[1],
    }
    return {"repeated": (two_again.operations - two.operations) // 2, "kept": kept}


class Empty:
    """A class that sees, without weights. If it learns, it is lent what learns."""

    def __init__(self, config: PretrainedConfig, learning: dict[str, Any] | None) -> None:
        given = learning or {"dtype": "fp32", "attention": "eager"}
        self._dtype = DTYPES[given["dtype"]]
        whole = unfilled_whole(config, self._dtype, given["attention"])
        embedding: Any = whole.get_input_embeddings()
        self._front, self._hidden = Front(whole, inner_of(whole), embedding), embedding.weight.shape[1]
        self._lent: Lent | None = None
        if learning:
            lender = Lender(
                {name: torch.empty(shape, dtype=self._dtype, device=_META) for name, shape in given["shapes"].items()},
                partial(AdaptedLayers, given["adapters"], 1.0, given["dropout"])
                if given["adapters"]
                else partial(ChangedWeights, given["changes"]),
            )
            self._front.learn(lender, again=given.get("again", False))
            self._lent = lender.lent()

    def look(self, processor: Processor, shapes: Sequence[Any]) -> _Looked:
        """Compute a document with blank files of these shapes. The class may raise any error."""
        texts = processor.replacements(tuple(shapes))
        ids = processor.encode(" and ".join(texts))  # some classes take pictures side by side for one
        inputs = processor.inputs([shape.modality.blank(shape) for shape in shapes], ids)
        return self.over(ids, inputs)._replace(tokens=sum(len(processor.encode(text)) for text in texts))

    def over(self, ids: Sequence[int], inputs: Mapping[str, Tensor]) -> _Looked:
        """Compute a document of these tokens, with the inputs of its pictures."""
        states = torch.empty(1, len(ids), self._hidden, dtype=self._dtype, device=_META)
        before = self._front.operations.all
        with torch.set_grad_enabled(self._lent is not None), _ShapesAlone(), _Fused(), kept_of(self._front) as kept:
            joined = states if self._lent is None else self._lent.joined(states)
            self._front.row(torch.tensor([list(ids)]), lambda _: joined, [len(ids)], [Seen(0, inputs)], self._lent)
        return _Looked(len(ids), self._front.operations.all - before, kept)


class _Fused(TorchFunctionMode):
    """Has attention keep what its kernels keep. On `meta` PyTorch would take one that keeps all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], *args[3:4] or [given.get("attn_mask")])
        return func(*args, **given)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        # Its result lies as the heads are put side by side afterwards.
        result = query.new_empty(*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1]).transpose(-3, -2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        raise AssertionError("nothing is computed backwards on meta")


class _ShapesAlone(TorchDispatchMode):
    """Computes only shapes of whatever depends on a tensor on `meta`, and values of everything else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, named)) if isinstance(value, Tensor)]
        device = named.get("device")
        if any(tensor.is_meta for tensor in tensors):
            if device is not None:
                named["device"] = _META
            if func._schema.name in _INDEXING:
                args = (args[0], _places(args[1]), *args[2:])
            args, named = tree_map(lambda value: value.to(_META) if isinstance(value, Tensor) else value, (args, named))
        elif device is not None and torch.device(device).type == "meta":
            named["device"] = torch.device("cpu")  # a grid, say, that the class makes where its weights are
        return func(*args, **named)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices, in which a mask is replaced by its places: how many there are is lost on `meta`."""
    found = list[Tensor | None]()
    for index in indices:
        if index is not None and index.dtype == torch.bool and not index.is_meta:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _time(work: Callable[[], object]) -> float:
    """The median seconds of a core for `work`, whatever else the machine does, after a first time that makes what is
    made once. Long work is done just twice."""
    begun = time.process_time()
    work()
    times = 1 if time.process_time() - begun > _LONG else _TIMES
    taken = list[float]()
    for _ in range(times):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return median(taken)
