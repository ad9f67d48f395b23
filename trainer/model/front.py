"""The part in front of the decoder of a class that sees: its tower, its projector, and the code that places features.

Each document with pictures goes alone through the class that people load, and is stopped at the class's decoder. What
the class hands to the decoder then is put end to end for the row, and the decoder that trains computes the row once:

    document 0    "see <picture> well"    class -> states, positions, masks, features of deeper layers   |
    document 1    "no picture"            class -> states, positions, masks                              |-> decoder
    document 2    "<picture> <picture>"   class -> states, positions, masks, features of deeper layers   |

So the class itself decides where features go, how positions turn (M-RoPE), and which tokens of a picture see each
other. Nothing here knows a family. All of the class that is needed for it is frozen, whole on each rank, and outside of
ZeRO-3, so a rank without pictures has nothing to wait for.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from trainer.model.features import FEATURES, Reads, alike, encoders_of, given_back, observed
from trainer.model.micro_batch import Seen
from trainer.model.operations import Operations
from trainer.model.parts import is_layer
from trainer.model.rows.row import AtWork
from trainer.model.towers import Adapted, Borrowing, Lender, Lent

Inputs = Mapping[str, Tensor]
Handed = dict[str, Any]
"""The arguments of a decoder, by their names."""


class _LookUp(NamedTuple):
    """A call of an embedding inside of the decoder: its name there, its ids, and zeros in place of its result."""

    name: str
    ids: Tensor
    zeros: Tensor


class CannotSee(Exception):
    """The class hands something to its decoder that no row can have; the text says what, as a clause."""


class _Stop(Exception):
    pass


class Front:
    """A class that sees, stopped at its `decoder`.

    The decoder's own weights are not needed, and neither is the embedding: the states of tokens are given. A class may
    look tokens up in other embeddings of its decoder (Gemma 4 E2B has one of each layer's inputs). It gets zeros, and
    the decoder that trains looks up the tokens of the whole row at once, as the ranks gather its embeddings together.

    `reads_prompts`: the types of tokens tell the class which are before an answer, 0, and which are not, 1.
    """

    def __init__(
        self, whole: nn.Module, decoder: nn.Module, embedding: nn.Module, *, reads_prompts: bool = False
    ) -> None:
        self.reads_prompts = reads_prompts
        self._whole = whole.eval().requires_grad_(False)
        layers = [module for module in whole.modules() if is_layer(module)]
        inside = {inner for layer in (decoder, *layers) for inner in layer.modules() if inner is not layer}
        self._layers = [layer for layer in layers if layer not in inside]
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._handed: Handed = {}
        self._states: Tensor | None = None
        self._looked_up = list[_LookUp]()
        self._borrowing: Borrowing | None = None
        self._lent: Lent | None = None
        self.operations = Operations()  # of all that it has computed
        decoder.forward = self._stop
        embedding.forward = self._embed
        for name, module in decoder.named_modules():
            if isinstance(module, nn.Embedding) and module is not embedding:
                stand_in: Any = partial(self._look_up, name, module.embedding_dim)
                module.forward = stand_in
        self._embedding, self._shape = embedding, torch.Size()
        weight = embedding._parameters.get("weight")
        if weight is not None and weight.is_meta:
            self._shape = weight.shape
            del embedding._parameters["weight"]
            embedding.weight = weight.detach()  # no parameter of the class, as no file fills it

    @property
    def whole(self) -> nn.Module:
        """The class, with its own weights alone."""
        return self._whole

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the part that sees, in the order in which the class has them."""
        return self._layers

    def learn(self, lender: Lender, *, again: bool) -> None:
        """Have the class compute with what is lent.

        With `again` a layer that has adapters keeps its inputs alone, and its backward pass computes it again."""
        self._borrowing = lender.borrowing(self._whole)
        for layer in self._layers if again else ():
            if any(isinstance(module, Adapted) for module in layer.modules()):
                layer.forward = partial(self._computed_again, layer.forward)

    def _computed_again(self, layer: Callable[..., Any], *given: Any, **named: Any) -> Any:
        before = self.operations.forward
        later = self._later(self._lent)
        result = checkpoint(layer, *given, use_reentrant=False, context_fn=lambda: (nullcontext(), later), **named)
        if any(isinstance(one, Tensor) and one.requires_grad for one in tree_leaves(result)):
            self.operations.repeated(self.operations.forward - before)
        return result

    @contextmanager
    def _later(self, lent: Lent | None) -> Iterator[None]:
        """In the backward pass nothing is lent any more, and another row may be at work."""
        with AtWork(None), self._borrowed(lent):
            yield

    def _borrowed(self, lent: Lent | None) -> AbstractContextManager[None]:
        return self._borrowing.using(lent) if self._borrowing and lent else nullcontext()

    def row(
        self,
        ids: Tensor,
        states: Tensor,
        lengths: Sequence[int],
        seen: Sequence[Seen],
        lent: Lent | None = None,
        decoder: nn.Module | None = None,
    ) -> Handed:
        """The arguments of the `decoder` that trains for a row of documents that have `lengths` tokens each.

        ids (1, T), and states (1, T, H), what the embedding makes of them. Gradients reach the states, and what
        is `lent`. Without a decoder, what the class looks up in it stays zero.
        """
        self._looked_up.clear()
        self._lent = lent
        try:
            with self._borrowed(lent):
                return self._row(ids, states, lengths, seen, decoder)
        finally:
            self._lent = None  # it takes memory

    def _row(
        self,
        ids: Tensor,
        states: Tensor,
        lengths: Sequence[int],
        seen: Sequence[Seen],
        decoder: nn.Module | None,
    ) -> Handed:
        inputs = {one.segment: one.inputs for one in seen}
        parts = zip(ids.split(list(lengths), 1), states.split(list(lengths), 1), strict=True)
        # A document without pictures goes the same way, because its class may have made windows in the others' masks.
        each = [self._document(own, embedded, inputs.get(number, {})) for number, (own, embedded) in enumerate(parts)]
        if decoder is not None:
            self._fill(each, decoder)
        positions = _positions([handed.pop("position_ids", None) for handed in each], lengths, states.device)
        names = dict.fromkeys(name for handed in each for name in handed)
        joined = {name: _end_to_end([handed.get(name) for handed in each], lengths, name) for name in names}
        return {**joined, "position_ids": positions}

    def _fill(self, each: Sequence[Handed], decoder: nn.Module) -> None:
        """Put what the decoder looks up in the place of the zeros."""
        for name in dict.fromkeys(one.name for one in self._looked_up):
            own = [one for one in self._looked_up if one.name == name]
            values = decoder.get_submodule(name)(torch.cat([one.ids.flatten() for one in own])[None])[0]
            for one, value in zip(own, values.split([one.ids.numel() for one in own]), strict=True):
                for handed in each:
                    handed |= {key: value.reshape(old.shape) for key, old in handed.items() if _is_all_of(old, one)}
        self._looked_up.clear()

    def _document(self, ids: Tensor, states: Tensor, inputs: Inputs) -> Handed:
        """The arguments that the class hands to its decoder for one document."""
        self._states, self._handed = states, {}
        if self._shape:  # a class may read a weight and use nothing of it; a use would be seen in the trial
            self._embedding.weight = states.new_full((), float("nan")).expand(self._shape)
        with AtWork(None), self.operations:  # the tower's patches are no documents of the row
            try:
                self._whole(input_ids=ids, use_cache=False, **_as_taken(inputs, states.dtype))
            except _Stop:
                return self._handed
            finally:
                self._states, self._handed = None, {}
        raise CannotSee("its class computes nothing by its decoder")

    @torch.no_grad()
    def taken_out(self, ids: Tensor, inputs: Inputs, of_tokens: Inputs, states: Tensor) -> "TakenOut":
        """Return what the class needs of a document's pictures to hand the same to its decoder without its tower.

        ids (1, T). `inputs` are those that follow from the pictures, with the pixels first, and `of_tokens` those that
        follow from the ids. The `states` (1, T, H) of the tokens may be any.

        Raises `CannotSee` if the class cannot do without its tower.
        """
        inner: Any = self._whole.base_model
        encoders = encoders_of(inner)
        if not encoders:
            raise CannotSee("its class has no features of pictures that could be kept")
        made = _as_taken(inputs, states.dtype)
        pixels = next(iter(made))
        reads = Reads(made)
        with observed(inner, reads) as results, reads:
            plain = self._document(ids, states, {**made, **of_tokens})
        kinds = [result.kind for result in results]
        if not kinds or len(set(kinds)) != len(kinds):
            raise CannotSee("its class does not compute the features of all pictures of a document at once")
        known = [name for kind in kinds for name in inspect.signature(encoders[kind]).parameters]
        first = {next(iter(inspect.signature(encoders[kind]).parameters)) for kind in kinds}
        encoded = first if len(kinds) > 1 else {pixels}
        beside = {
            name: made[name] for name in made if name not in encoded and (name in reads.found or name not in known)
        }
        kept = {**beside, **{name: value for result in results for name, value in result.kept().items()}}
        weights = Reads(dict(self._whole.state_dict(keep_vars=True)))
        try:
            with weights:
                again = self._document(ids, states, {**kept, **of_tokens})
        except CannotSee:
            raise
        except Exception as error:  # a class may raise any error where it misses what it was not given
            raise CannotSee(f"its class cannot do without its tower ({type(error).__name__}: {error})") from error
        if not alike(plain, again):
            raise CannotSee(f"its class makes something else of kept features than of the {pixels}")
        return TakenOut(kept, frozenset(weights.found))

    def _stop(self, *arguments: Any, **given: Any) -> Any:
        # Arguments that a class passes on and the decoder does not name would reach the kernels.
        named = dict(zip(self._names, arguments, strict=False)) | given
        dropped = ("use_cache", "past_key_values", "cache", "input_ids", "return_dict", "output_hidden_states")
        self._handed = {
            name: value
            for name, value in named.items()
            if name in self._names and name not in dropped and value is not None
        }
        raise _Stop

    def _embed(self, ids: Tensor, *_given: Any) -> Tensor:
        if self._states is None or ids.shape != self._states.shape[:2]:
            raise CannotSee("its class embeds tokens that are not those of the document")
        return self._states

    def _look_up(self, name: str, width: int, ids: Tensor, *_given: Any) -> Tensor:
        assert self._states is not None
        zeros = self._states.new_zeros(*ids.shape, width)
        self._looked_up.append(_LookUp(name, ids, zeros))
        return zeros


def _is_all_of(value: Any, one: _LookUp) -> bool:
    """Whether an argument of the decoder is what was looked up, in whatever shape."""
    return (
        isinstance(value, Tensor)
        and value.untyped_storage().data_ptr() == one.zeros.untyped_storage().data_ptr()
        and value.is_contiguous()
        and value.numel() == one.zeros.numel()
    )


class TakenOut(NamedTuple):
    """`kept` is what the class made of the pictures of a document, by the names of `Seen.inputs`. `weights` names the
    weights of the class that it still computes with."""

    kept: dict[str, Tensor]
    weights: frozenset[str]


def _as_taken(inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    """The inputs of the class. Kept features take the place of pixels."""
    given = dict[str, Any]()
    for name, value in inputs.items():
        if not name.startswith(FEATURES):
            # One class's processor makes pixels in 16 bits, others in fp32, whatever the model is in.
            given[name] = value.to(dtype) if value.is_floating_point() else value
    if kept := {name: value for name, value in inputs.items() if name.startswith(FEATURES)}:
        given["mm_encoder_outputs"] = given_back(kept)
    return given


def part_of_row(handed: Handed, first: int, size: int) -> Handed:
    """The arguments of the decoder for `size` tokens of a row from place `first` on, which a rank has of a row that it
    shares. Masks stay those of the whole row, whose tokens a rank has with fewer heads.

    Raises `CannotSee` if it is not known to which tokens features belong.
    """
    tokens, own = handed["position_ids"].shape[-1], slice(first, first + size)
    chosen = {
        int(value.sum()): value[0]
        for value in handed.values()
        if isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == (1, tokens)
    }

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(name, one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([cut(name, one) for one in value])
        if not isinstance(value, Tensor) or value.shape[-2:] == (tokens, tokens):
            return value
        if name == "position_ids":
            return value[..., own]
        if value.ndim >= 2 and value.shape[:2] == (1, tokens):
            return value[:, own]
        if value.ndim and len(value) in chosen:  # a value for each token of a picture
            mask = chosen[len(value)]
            begin = int(mask[:first].sum())
            return value[begin : begin + int(mask[own].sum())]
        raise CannotSee(f"it is not known to which tokens the {name} of its decoder belong")

    return {name: cut(name, value) for name, value in handed.items()}


def _positions(values: Sequence[Tensor | None], lengths: Sequence[int], device: torch.device) -> Tensor:
    """(1, T), or (axes, 1, T) where the class turns a document's positions by several axes."""
    axes = max((len(value) for value in values if value is not None and value.ndim == 3), default=0)
    parts = list[Tensor]()
    for value, length in zip(values, lengths, strict=True):
        part = torch.arange(length, device=device)[None] if value is None else value
        parts.append(part if part.ndim == 3 or not axes else part.expand(axes, 1, length))
    return torch.cat(parts, -1)


def _end_to_end(values: Sequence[Any], lengths: Sequence[int], name: str) -> Any:
    """An argument of the decoder for the row: None stands for a document without one."""
    given = [(value, length) for value, length in zip(values, lengths, strict=True) if value is not None]
    if not given:
        return None
    first, length = given[0]
    if isinstance(first, Mapping):
        every = [value if isinstance(value, Mapping) else {} for value in values]
        return {key: _end_to_end([one.get(key) for one in every], lengths, name) for key in first}
    if isinstance(first, (list, tuple)):
        parts = [
            _end_to_end([None if value is None else value[place] for value in values], lengths, name)
            for place in range(len(first))
        ]
        return type(first)(parts)
    if not isinstance(first, Tensor):
        if any(value != first for value, _ in given):
            raise CannotSee(f"its decoder takes one {name} for all documents")
        return first
    if first.ndim == 4 and first.shape[2:] == (length, length):
        return _masks(values, lengths)
    if name == "attention_mask":  # (1, T), of padding that no document has
        return None
    if first.ndim >= 2 and first.shape[:2] == (1, length):
        parts = [
            first.new_zeros(1, own, *first.shape[2:]) if value is None else value
            for value, own in zip(values, lengths, strict=True)
        ]
        return torch.cat(parts, 1)
    return torch.cat([value for value, _ in given])  # of the pictures' tokens alone, in their order


def _masks(values: Sequence[Tensor | None], lengths: Sequence[int]) -> Tensor:
    """Masks (1, 1, T, T) along the diagonal. A class leaves out the mask of a document that is plainly causal."""
    first = next(value for value in values if value is not None)
    seen = torch.zeros(1, 1, sum(lengths), sum(lengths), dtype=torch.bool, device=first.device)
    begin = 0
    for value, length in zip(values, lengths, strict=True):
        own = slice(begin, begin + length)
        if value is None:
            seen[0, 0, own, own] = torch.ones(length, length, dtype=torch.bool, device=first.device).tril()
        else:
            seen[0, 0, own, own] = value[0, 0] if value.dtype == torch.bool else value[0, 0] == 0
        begin += length
    if first.dtype == torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=first.dtype).masked_fill(~seen, torch.finfo(first.dtype).min)
