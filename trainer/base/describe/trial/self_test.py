"""Tests a family's code before anything is trained, with a small model of the same kinds of layers.

It computes packed documents and each document alone, and computes with packed and with plain weights. The results must
be equal up to rounding. The test takes tenths of a second. It finds errors that the model's parts do not show: a mask
without the documents' borders, positions that are counted through a whole row, or a layer that cannot compute a slice
of a row, or with 4-bit weights.

If the class that users load also processes pictures or sound, a small version of it is tried too. It must predict text
exactly as the language model does. Its decoder and its head are those of the small language model. Its towers take no
memory, because text does not reach them. A module that text does reach gets random weights when it is called.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from inspect import signature
from threading import Barrier, BrokenBarrierError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.base.describe.empty_model import whole_model
from trainer.base.describe.language_model import inner_of, with_parts_of
from trainer.base.describe.logits import probe_logits
from trainer.base.describe.trial.small import small_id
from trainer.base.describe.trial.weight_readers import WeightPlace, read_together, weight_place
from trainer.model.balance import UNKNOWN_ROUTERS, places_of_choice, routers, without_choice
from trainer.model.documents import keep_documents_apart
from trainer.model.experts import IMPLEMENTATION, prepare_experts
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import hold
from trainer.model.parts import body, decoder_layers, is_experts
from trainer.model.rows.row import CannotDivide, lengths_known

_LENGTHS = (7, 21, 12)  # longer than the small model's windows, and shorter
_DIFFERENT = 1e-4  # of the largest value
# The last bits of a token's score may decide to which expert it goes. Noise of that size also moves such a token, in
# one of the draws. It does not change a token that differs for another reason.
_NOISE, _DRAWS = 2.0**-18, 8
_MOST = 0.5  # the largest share of a text's tokens that may see later tokens
_PADDING = 9  # padding tokens after a document
_IDS = 5  # the number of token ids that are tried as padding
_OTHERWISE = "a small model of its kind predicts otherwise then"
_FORM = Blocks("nf4")


class Found(NamedTuple):
    """The result of the trial.

    It says whether tokens see later ones, whether gradients reach layers after frozen embeddings, and whether the
    documents of a row, or one with padding behind it, are computed as each alone. It has the token for padding, and the
    reasons, if any, why ranks cannot share a row, documents cannot share a prefix, 4-bit weights cannot be used, or
    routers of a mixture cannot be balanced. It also has the linear layers that read the same tensor."""

    looks_ahead: bool
    learns: bool
    keeps_documents_apart: bool
    padding: int
    fails_shared: str | None
    fails_prefix: str | None
    fails_packed: str | None
    fails_balance: str | None
    together: set[tuple[WeightPlace, ...]]


def try_family(model: PreTrainedModel, read: Collection[WeightPlace]) -> Found:
    """Try the family of the small `model`, which is unusable afterwards. Linear layers at the places `read` stay plain.

    Raises any error that the forward pass raises with plain weights and one document.
    """
    model.eval()
    inner = body(model)
    tokens = some_text(model, sum(_LENGTHS))
    documents = tokens.split(_LENGTHS, dim=1)
    noise = _Noise(model)

    def each_alone() -> Tensor:
        return torch.cat([hidden_states(inner, document) for document in documents], dim=1)

    with torch.no_grad():
        alone = each_alone()
        begun, first = hidden_states(inner, documents[1][:, : _LENGTHS[1] // 2]), _LENGTHS[0]
        until = first + begun.shape[1]
        # Ties of scores may also be resolved differently in a longer text. That does not mean that a token sees later
        # ones.
        others = noise.others(begun, alone[:, first:until], lambda: each_alone()[:, first:until])
        ahead = float(others.float().mean()) >= _MOST
        keep_documents_apart(model)
        positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
        one = documents[1]
        apart = takes_positions(inner) and _is_as_alone(noise, inner, tokens, _LENGTHS, each_alone)
        apart = apart and _is_as_alone(noise, inner, one, _LENGTHS[1:2], lambda: hidden_states(inner, one))
        padding = _padding(noise, model, inner, one, (_LENGTHS[1], _PADDING)) if apart else None
        apart = padding is not None
        if padding is None:  # a row is then computed as one document
            padding = _padding(noise, model, inner, one, (_LENGTHS[1] + _PADDING,))
        shared = _fails_shared(noise, inner, tokens, positions, each_alone) or (None if apart else _OTHERWISE)
        prefix, learns = _fails_prefix(noise, inner, documents), _learns(model, inner, documents[1])
        together = read_together(inner, lambda: hidden_states(inner, documents[1]))
        balance = _fails_balance(model, inner, documents[1])
        packed = _fails_packed(noise, model, inner, documents[1], read)
        return Found(ahead, learns, apart, padding or 0, shared, prefix, packed, balance, together)


class _Noise:
    """Tells tokens that are computed differently from tokens for which only the last bits decide."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._embedding = model.get_input_embeddings()

    def differs(self, found: Tensor, expected: Tensor, again: Callable[[], Tensor]) -> bool:
        return bool(self.others(found, expected, again).any())

    def others(self, found: Tensor, expected: Tensor, again: Callable[[], Tensor]) -> Tensor:
        """Whether each token's states `found` (1, T, H) are far from `expected` for a real reason, (T,) bool.

        A reason is real if the states that are computed `again` with noise in the embeddings are never that far away.
        """
        wrong, draw = _far(found, expected), 0
        while wrong.any() and draw < _DRAWS:
            with self.drawn(draw):
                wrong &= ~_far(again(), expected)
            draw += 1
        return wrong

    @contextmanager
    def drawn(self, seed: int) -> Iterator[None]:
        generator = torch.Generator().manual_seed(seed)

        def shake(_module: nn.Module, _given: Any, states: Tensor) -> Tensor:
            return states * (1 + _NOISE * torch.randn(states.shape, generator=generator))

        hook = self._embedding.register_forward_hook(shake)
        try:
            yield
        finally:
            hook.remove()


def _is_as_alone(
    noise: _Noise, inner: nn.Module, tokens: Tensor, lengths: Sequence[int], alone: Callable[[], Tensor]
) -> bool:
    """Whether a row of documents of these lengths, of which the last may be padding, is computed as each is `alone`."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    expected = alone()
    try:
        with lengths_known(tuple(lengths)):
            found = hidden_states(inner, tokens, positions)
    except Exception:  # a family's code for rows that it was not made for
        return False
    return not noise.differs(found[:, : expected.shape[1]], expected, alone)


def _padding(
    noise: _Noise, model: PreTrainedModel, inner: nn.Module, document: Tensor, lengths: tuple[int, ...]
) -> int | None:
    """The first token id that works as padding behind a document in a row of these `lengths`. None if none works.

    With it the document must be computed as it is alone, and with finite gradients. Some families divide by the length
    of a vector, which is 0 for transformers' own padding token."""
    size = document.shape[1]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    learning = [value for value in model.parameters() if value.requires_grad]
    for token in range(_IDS):
        row = torch.cat([document, torch.full((1, sum(lengths) - size), token)], dim=1)
        if not _is_as_alone(noise, inner, row, lengths, lambda: hidden_states(inner, document)):
            return None
        try:
            with torch.enable_grad(), lengths_known(lengths):
                loss = hidden_states(inner, row, positions)[:, :size].square().sum()
                found = torch.autograd.grad(loss, learning, allow_unused=True)
        except Exception:  # a family with its own backward code may raise any error
            return None
        if all(grad is None or bool(grad.isfinite().all()) for grad in found):
            return token
    return None


def some_text(model: PreTrainedModel, length: int) -> Tensor:
    """Random tokens, (1, length) int64, without the first ids, which often have a special meaning."""
    others = min(200, model.config.get_text_config().vocab_size - 3)
    return torch.arange(length).mul(37).remainder(others).add(3)[None]


class ThreadPeers:
    """Threads of this process that share a row. Each has a slice of it."""

    size = 2

    def __init__(self, part: int, given: list[Tensor], meeting: Barrier) -> None:
        self.part, self._given, self.meeting = part, given, meeting

    def swap(self, pieces: Tensor) -> Tensor:
        self._given[self.part] = pieces
        self.meeting.wait()
        received = torch.stack([given[self.part] for given in self._given])
        self.meeting.wait()
        return received

    def total(self, mine: Tensor) -> Tensor:
        raise AssertionError("layers exchange heads, and add nothing up")


def _fails_shared(
    noise: _Noise, inner: nn.Module, tokens: Tensor, positions: Tensor, alone: Callable[[], Tensor]
) -> str | None:
    """Why two ranks, here threads, cannot share a row of documents. None if each is computed as it is `alone`."""
    given, meeting = [tokens] * ThreadPeers.size, Barrier(ThreadPeers.size)

    def compute(part: int) -> Tensor | str | None:
        slices = (values.chunk(ThreadPeers.size, dim=1)[part] for values in (tokens, positions))
        try:
            with torch.no_grad(), lengths_known(_LENGTHS, ThreadPeers(part, given, meeting)):
                return hidden_states(inner, *slices)
        except BrokenBarrierError:  # the other thread reports the reason
            return None
        except Exception as error:  # a family's code may raise any error for a part of a row
            meeting.abort()
            return _reason(error)

    with ThreadPoolExecutor(ThreadPeers.size) as pool:
        found = list(pool.map(compute, range(ThreadPeers.size)))
    if why := next((part for part in found if isinstance(part, str)), None):
        return why
    parts = [part for part in found if isinstance(part, Tensor)]
    return _OTHERWISE if noise.differs(torch.cat(parts, dim=1), alone(), alone) else None


def _fails_prefix(noise: _Noise, inner: nn.Module, documents: Sequence[Tensor]) -> str | None:
    """Why documents cannot share a prefix. None if they can.

    A document that continues another one's first tokens must be computed as if it followed a copy of these.
    """
    first, other = documents[1], documents[2]
    prefix, lengths = first.shape[1] // 2, (first.shape[1], other.shape[1])

    def behind_a_copy() -> Tensor:
        return hidden_states(inner, torch.cat([first[:, :prefix], other], dim=1))[:, prefix:]

    positions = torch.cat([torch.arange(lengths[0]), torch.arange(prefix, prefix + lengths[1])])[None]
    try:
        with lengths_known(lengths, prefixes=((0, 0), (0, prefix))):
            found = hidden_states(inner, torch.cat([first, other], dim=1), positions)[:, lengths[0] :]
    except Exception as error:  # a family's code may raise any error for rows that it was not made for
        return _reason(error)
    return _OTHERWISE if noise.differs(found, behind_a_copy(), behind_a_copy) else None


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, CannotDivide) else f"it raises {type(error).__name__} then"


def hidden_states(inner: nn.Module, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    given = dict[str, Any]()
    if takes_positions(inner):
        given["position_ids"] = torch.arange(tokens.shape[1])[None] if positions is None else positions
    return inner(input_ids=tokens, use_cache=False, **given)[0]


def takes_positions(inner: nn.Module) -> bool:
    """Whether a body takes positions, which say where the documents of a row begin."""
    return "position_ids" in signature(inner.forward).parameters


def _far(one: Tensor, other: Tensor) -> Tensor:
    """Whether each token's values (1, T, ...) differ by more than rounding, (T,) bool."""
    return ~((one - other).abs().amax(-1)[0] <= _DIFFERENT * other.abs().amax())


def are_alike(one: Tensor, other: Tensor) -> bool:
    """Whether the values (1, T, ...) of all tokens are equal up to rounding."""
    return not _far(one, other).any()


def _learns(model: PreTrainedModel, inner: nn.Module, document: Tensor) -> bool:
    layers = decoder_layers(model)
    learning = set(layers.parameters()) if layers is not None else set[nn.Parameter]()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in learning)
    with torch.enable_grad():
        return hidden_states(inner, document).requires_grad


def _fails_balance(model: PreTrainedModel, inner: nn.Module, document: Tensor) -> str | None:
    """Return why the routers cannot be balanced (trainer/model/balance.py). None if they can, or there are none."""
    if not any(map(is_experts, model.modules())):
        return None
    found, wrong = routers(model), list[str]()

    def look(module: nn.Module, _given: Any, results: Any) -> None:
        if not isinstance(results, tuple) or not places_of_choice(results, found[module]):
            wrong.append(without_choice(module))

    hooks = [module.register_forward_hook(look) for module in found]
    try:
        hidden_states(inner, document)
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(wrong), None) if found else UNKNOWN_ROUTERS


def _fails_packed(
    noise: _Noise, model: PreTrainedModel, inner: nn.Module, document: Tensor, read: Collection[WeightPlace]
) -> str | None:
    weights = list(_packable(model, read))
    packed = [_packed(weight.data) for _, weight in weights]
    for (_, weight), (_, _, left) in zip(weights, packed, strict=True):
        weight.data = left
    shaken = [hidden_states(inner, document)]
    for draw in range(_DRAWS):
        with noise.drawn(draw):
            shaken.append(hidden_states(inner, document))
    try:
        prepare_experts(model)
        for experts in filter(is_experts, model.modules()):
            getattr(experts, "config", model.config)._experts_implementation = IMPLEMENTATION
        for (name, weight), (codes, absmax, _) in zip(weights, packed, strict=True):
            module = hold(model, name, weight, _FORM, torch.float32)
            module.weight, module.absmax = (nn.Parameter(part, requires_grad=False) for part in (codes, absmax))
        found = hidden_states(inner, document)
    except Exception as error:  # a family's code that inspects a weight may raise any error
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]
    plain, *others = shaken
    again = iter(others)
    return "its predictions are others then" if noise.differs(found, plain, lambda: next(again)) else None


def _packable(model: PreTrainedModel, read: Collection[WeightPlace]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the weight of what can be packed: linear layers of decoder layers, and stacks of experts."""
    layers = decoder_layers(model)
    inside = set(layers.modules()) if layers is not None else set[nn.Module]()
    for path, module in model.named_modules():
        around, _, name = path.rpartition(".")
        if is_experts(module):
            yield from (entry for entry in module.named_parameters(path, recurse=False) if entry[1].ndim == 3)
        elif not isinstance(module, nn.Linear) or module not in inside:
            continue
        elif weight_place(model.get_submodule(around), name) not in read:
            yield f"{path}.weight", module.weight


def _packed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes and the absmax of a matrix or of a stack, as bytes, and its values after quantization."""
    matrices = [matrix.flatten() for matrix in (weight if weight.ndim == 3 else weight[None])]
    columns, found, left = weight.shape[-1], list[Mapping[str, Tensor]](), list[Tensor]()
    for matrix in matrices:
        found.append(_FORM.encode(matrix, columns))
        left.append(_FORM.decode(found[-1], len(matrix), columns, torch.float32))
    codes, absmax = (torch.cat([parts[name] for parts in found]) for name in ("weight", "absmax"))
    return codes, absmax, torch.cat(left).view(weight.shape)


_AS_WIDE = ("out_hidden_size", "text_hidden_size")
"""Settings of towers that classes require to be the language model's hidden size."""


def small_whole(config: PretrainedConfig, language: PreTrainedModel) -> PreTrainedModel:
    """The whole model that `config` describes, around the small `language` model.

    transformers may raise any error for sizes that a class was not made for."""
    made = copy.deepcopy(config)
    text, small = made.get_text_config(), language.config.get_text_config()
    around, place = next(_places(made, text))
    for key, value in vars(text).items():  # a setting that also stands in the whole's settings
        if key in vars(around) and vars(around)[key] == value and key in vars(small):
            setattr(around, key, vars(small)[key])
    for part in parts_of(made):
        for key, value in list(vars(part).items()):
            if key in _AS_WIDE and value == text.hidden_size:
                setattr(part, key, small.hidden_size)
            else:
                setattr(part, key, small_id(key, value))
    setattr(around, place, small)
    whole = hollow(with_parts_of(whole_model(made, torch.float32), language))
    for module in whole.modules():
        module.register_forward_pre_hook(_fill)
    return whole.eval()


def predicts_otherwise(whole: PreTrainedModel, language: PreTrainedModel) -> bool:
    """Whether `small_whole` predicts text differently than the `language` model.

    The known scaling and capping of logits is applied to the language model. The class may raise any error for text
    without pictures or sound."""
    head: Any = language.get_output_embeddings()
    tokens = some_text(language, 21)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = whole(input_ids=tokens, use_cache=False).logits
        found = head(hidden_states(body(language), tokens))
        logits = probe_logits(whole, inner_of(whole), head)
    return logits is None or not are_alike(logits(found), expected)


def reads_prompts(whole: PreTrainedModel) -> bool:
    """Whether the tokens before an answer see each other in `small_whole`, those of the answer see them and the tokens
    before themselves, and no token sees an answer that follows.

    The class is told by token types: 0 before an answer, and 1 from there on."""
    tokens, prompt = some_text(whole, 21), 12
    types = (torch.arange(21) >= prompt).long()[None]

    def states(*changed: int) -> Tensor:
        other = tokens.clone()
        other[:, list(changed)] += 1
        return whole(input_ids=other, token_type_ids=types, use_cache=False).logits

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        plain, last, answered = states(), states(prompt - 1), states(prompt + 3)
    in_prompt, before = slice(0, prompt - 1), slice(0, prompt + 3)
    return bool(_far(last[:, in_prompt], plain[:, in_prompt]).all()) and are_alike(
        answered[:, before], plain[:, before]
    )


def parts_of(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The settings, and those inside them, at any depth."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from parts_of(value)


def _places(config: PretrainedConfig, text: PretrainedConfig) -> Iterator[tuple[PretrainedConfig, str]]:
    """Yield the settings that contain those of the language model, at any depth, and their name there."""
    for part in parts_of(config):
        yield from ((part, key) for key, value in vars(part).items() if value is text)


def hollow(whole: PreTrainedModel) -> PreTrainedModel:
    """`whole`, made on `meta`, with zeros on the CPU that take no memory. Its code may ask for its weights' device."""
    for module in whole.modules():
        for name, value in module._parameters.items():
            if value is not None and value.is_meta:
                module._parameters[name] = nn.Parameter(_zeros(value), requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None and value.is_meta:
                module._buffers[name] = _zeros(value)
    return whole


def _zeros(value: Tensor) -> Tensor:
    return torch.zeros((), dtype=value.dtype).expand(value.shape)


def _fill(module: nn.Module, _given: Any) -> None:
    """Give the weights of `module` that take no memory random values, so that no module on text's path has zeros."""
    for name, value in module._parameters.items():
        if value is not None and value.numel() > 1 and not any(value.stride()):
            module._parameters[name] = nn.Parameter(0.05 * torch.randn(value.shape), requires_grad=False)
