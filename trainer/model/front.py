"""The part in front of the decoder of a class that sees: its tower, and the code that places features.

The tower is the encoder and the projector, which turn a picture, video or sound into features of the decoder.

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

from trainer.model.features import FEATURES, LISTS, TOKENS_OF, Reads, alike, encoders_of, given_back, observed
from trainer.model.micro_batch import Seen
from trainer.model.operations import Operations
from trainer.model.parts import is_layer
from trainer.model.rows.row import AtWork
from trainer.model.towers import Adapted, Borrowing, Lender, Lent

_STATES = "inputs_embeds"
_BASE = 128  # each number below it is exact in 16 bits
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
        self._tokens: _Tokens | None = None
        # A class that can make tokens of pictures may use them for something else. The first picture shows that.
        can = any(hasattr(module, TOKENS_OF) for module in whole.modules())
        self._makes_tokens: bool | None = None if can else False
        # None if the class has no weights.
        self._dtype = next((one.dtype for one in whole.parameters() if not one.is_meta), None)
        self._embedding, self._shape = embedding, torch.Size()
        weight, looked_up = embedding._parameters.get("weight"), embedding.weight
        assert isinstance(looked_up, Tensor)
        self._width = looked_up.shape[1]
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
        """The layers of the tower, in the order in which the class has them."""
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
        embed: Callable[[Tensor], Tensor],
        lengths: Sequence[int],
        seen: Sequence[Seen],
        lent: Lent | None = None,
        decoder: nn.Module | None = None,
    ) -> Handed:
        """The arguments of the `decoder` that trains for a row of documents that have `lengths` tokens each.

        ids (1, T). `embed` makes states (1, T, H) of them. It is called once, because the ranks gather the embedding
        together. Gradients reach the states, and the weights that are `lent`. Without a `decoder`, the class gets zeros
        for everything that it looks up in the decoder.
        """
        self._looked_up.clear()
        self._lent = lent
        try:
            with self._borrowed(lent):
                return self._row(ids, embed, lengths, seen, decoder)
        finally:
            self._lent = None  # it takes memory

    def _row(
        self,
        ids: Tensor,
        embed: Callable[[Tensor], Tensor],
        lengths: Sequence[int],
        seen: Sequence[Seen],
        decoder: nn.Module | None,
    ) -> Handed:
        parts, by_segment = ids.split(list(lengths), 1), {one.segment: one.inputs for one in seen}
        inputs = [by_segment.get(number, {}) for number in range(len(parts))]
        if self._makes_tokens is None:
            self._makes_tokens = self._has_made_tokens(parts, inputs)
        # A document without pictures goes the same way, because its class may have made windows in the others' masks.
        if self._makes_tokens:
            read = [self._with_tokens(own, given) for own, given in zip(parts, inputs, strict=True)]
            states = embed(torch.cat([tokens for tokens, _ in read], 1)).split(list(lengths), 1)
            each = [{**handed, _STATES: own} for (_, handed), own in zip(read, states, strict=True)]
        else:
            states = embed(ids).split(list(lengths), 1)
            each = [self._document(own, one, given) for own, one, given in zip(parts, states, inputs, strict=True)]
        if decoder is not None:
            self._fill(each, decoder)
        positions = _positions([handed.pop("position_ids", None) for handed in each], lengths, ids.device)
        names = dict.fromkeys(name for handed in each for name in handed)
        joined = {name: _end_to_end([handed.get(name) for handed in each], lengths, name) for name in names}
        return {**joined, "position_ids": positions}

    def _has_made_tokens(self, parts: Sequence[Tensor], inputs: Sequence[Inputs]) -> bool | None:
        """Whether the class makes tokens of pictures and looks them up in its embedding. None if there is no picture.

        To find out, it computes one document with pictures, whose operations are not counted."""
        shown = next((number for number, given in enumerate(inputs) if _has_pixels(given)), None)
        if shown is None or self._dtype is None:
            return None
        counted = self.operations
        self.operations = Operations()
        try:
            return not self._with_tokens(parts[shown], inputs[shown])[0].equal(parts[shown])
        except CannotSee:
            return False
        finally:
            self.operations = counted

    @torch.no_grad()
    def _with_tokens(self, ids: Tensor, inputs: Inputs) -> tuple[Tensor, Handed]:
        """Return a document's ids (1, T), with the ids that the class makes of its pictures in their places, and what
        the class hands to its decoder. The states in it are no embeddings, and must be replaced.

        Each token gets a state of its own. After the class has put the states in their places, each state says which
        token it is."""
        assert self._dtype is not None
        self._tokens = _Tokens(self._width, self._dtype)
        try:
            handed = self._document(ids, self._tokens.states_of(ids), inputs)
            return self._tokens.found(handed.get(_STATES)), handed
        finally:
            self._tokens = None

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
                self._whole(input_ids=ids, use_cache=False, **as_taken(inputs, states.dtype))
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
            raise CannotSee("its class has no method for features that could be kept, such as get_image_features")
        made = {name: value.to(states.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
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
            given = " and ".join(sorted(encoded))
            raise CannotSee(f"its class makes something else of kept features than of {given}")
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
            if self._tokens is not None:
                return self._tokens.states_of(ids)
            if self._states is not None and self._states.is_meta:
                return self._states.new_empty(*ids.shape, self._states.shape[-1])
            raise CannotSee("its class embeds tokens that are not those of the document")
        return self._states

    def _look_up(self, name: str, width: int, ids: Tensor, *_given: Any) -> Tensor:
        assert self._states is not None
        zeros = self._states.new_zeros(*ids.shape, width)
        self._looked_up.append(_LookUp(name, ids, zeros))
        return zeros


class _Tokens:
    """Ids in the order in which they were looked up, and states that stand for them. A state repeats the digits of its
    id's place in this order, to the width of a state."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._width, self._dtype = width, dtype
        self._ids = list[Tensor]()

    def states_of(self, ids: Tensor) -> Tensor:
        first = sum(one.numel() for one in self._ids)
        self._ids.append(ids.flatten())
        numbers = torch.arange(first, first + ids.numel(), device=ids.device)
        return self._states(numbers).view(*ids.shape, self._width)

    def _states(self, numbers: Tensor) -> Tensor:
        digits = torch.stack([numbers % _BASE, numbers // _BASE % _BASE, numbers // _BASE**2], -1)
        return digits.repeat(1, -(-self._width // 3))[:, : self._width].to(self._dtype)

    def found(self, states: Any) -> Tensor:
        """The ids (1, T) that states (1, T, H) stand for.

        Raises `CannotSee` if a state is none of those that `states_of` has returned."""
        ids = torch.cat(self._ids)
        if isinstance(states, Tensor):
            numbers = (states[..., :3].float() @ states.new_tensor([1, _BASE, _BASE**2], dtype=torch.float32)).long()
            numbers = numbers.clamp(0, len(ids) - 1)
            if states.equal(self._states(numbers.flatten()).view(states.shape)):
                return ids[numbers]
        raise CannotSee("its class changes the states of tokens before its decoder gets them")


def _has_pixels(inputs: Inputs) -> bool:
    return any(value.is_floating_point() and not name.startswith(FEATURES) for name, value in inputs.items())


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


def as_taken(inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    """The inputs in the form that the class takes. If features were kept, they replace the pixels."""
    given = dict[str, Any]()
    for name, value in inputs.items():
        if name.startswith(LISTS):
            given[name.removeprefix(LISTS)] = value.tolist()
        elif not name.startswith(FEATURES):
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
