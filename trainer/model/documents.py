"""Keeps the documents of a packed row separate in every layer that mixes tokens, in any model that transformers builds.

A row may be divided over ranks (trainer/model/rows/): then attention, and its mask, is for all of the row's tokens, and
every other layer for this rank's slice of them; trainer/model/rows/mixing.py has the layers that pass a state on.

A document may go on from a prefix that lies before it in the row, as several answers do that share their prompt
(`data.share_prefix`):

    row:        p p p p a a a b b b    a is one document with the prefix p, and b goes on from p
    positions:  0 1 2 3 4 5 6 4 5 6    b sees p and itself, and none of a

Attention knows the borders from its mask or from cu_seqlens. transformers makes most masks from restarting
position_ids, but some models make theirs without: here every mask that is made for a row gets the borders. The family's
own function of a mask is asked with places in the row, because blocks (the tokens of a picture, which see each other)
are looked up by the place of a token. Only chunks of tokens count from the beginning of a document.

Any other layer that mixes tokens (linear attention, a convolution, Mamba, attention that also compresses or picks
keys) takes the documents apart (trainer/model/rows/row.py), so that the kernels that are installed for it need not know
about borders.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.model.parts import body
from trainer.model.rows.attention import attend_across, attend_by_documents
from trainer.model.rows.mixing import divides, functions_of_module, on_whole_row
from trainer.model.rows.row import AtWork, CannotDivide, Documents, by_documents, described, row_at_work

# The names that layers of transformers use for what they keep of earlier tokens. Every module that mixes tokens needs
# it to generate.
_CACHES = {"cache", "past_key_values", "past_key_value", "cache_params", "layer_past"}
# Arguments that describe the whole row's borders, and mean nothing to a batch of documents.
_BORDERS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of activation checkpointing. A layer that is computed again in the backward pass, perhaps by
    another thread and after other rows, computes for its own row.
    """
    return nullcontext(), AtWork(row_at_work())


def keep_documents_apart(model: PreTrainedModel) -> None:
    """Make documents of a row not see each other in any layer of `model`, and make attention exchange heads with the
    ranks that share the row.

    What is put into transformers does as transformers does unless a row is at work, so other models of the process see
    nothing of it. Masks have a registry. Three places have none: transformers itself looks for documents in
    position_ids, it counts chunks from the beginning of a row, and a family's own eager attention is in no registry,
    but is the default that it asks `get_interface` with. tests/unit/model/test_upstream.py fails where one of them is
    no longer asked.
    """
    masking_utils.find_packed_sequence_indices = _find_documents
    masking_utils.chunked_overlay = _chunks_of_row
    AttentionInterface.get_interface = _interface_of_row  # type: ignore[method-assign]
    AttentionMaskInterface.register("sdpa", sdpa_mask_of_row)
    AttentionMaskInterface.register("eager", of_row(eager_mask))
    decoder, every = body(model), list(mixers(model))
    decoder.forward = _for_row(decoder.forward, all(_is_told_documents(mixer) for mixer in every))
    for mixer in every:
        if not knows_borders(mixer):
            mixer.forward = _in_batches(mixer, mixer.forward)


def mixers(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules inside a model's layers in which a token's result depends on other tokens: those that take
    a cache, without which they could not generate, or that have a convolution.
    """
    for child in model.children():
        if _mixes(child) and not any(isinstance(module, GradientCheckpointingLayer) for module in child.modules()):
            yield child
        else:
            yield from mixers(child)


def knows_borders(mixer: nn.Module) -> bool:
    """Whether tokens see each other only as a mask allows, or cu_seqlens: by an attention function of transformers'
    interface, which all read `is_causal` of their module, and by what picks keys for it under the same mask. Attention
    that scales queries without rotation by their place (Llama 4) counts tokens from the beginning of the row, whatever
    position_ids say."""
    if getattr(mixer, "attn_temperature_tuning", False) and not mixer.use_rope:
        return False
    if (attention := _normed_attention(mixer)) is not None:
        return knows_borders(attention)
    inside = (module for module in mixer.modules() if module is not mixer and _mixes(module))
    return hasattr(mixer, "is_causal") and all("attention_mask" in _arguments(module) for module in inside)


def _is_told_documents(mixer: nn.Module) -> bool:
    """Whether a layer needs no mask for the documents of a row: it computes them separately, or it calls an attention
    function of transformers' interface, which can, and nothing else that would read the mask.
    """
    if not knows_borders(mixer):
        return True
    inside = [module for module in mixer.modules() if module is not mixer and _mixes(module)]
    attention = inside[0] if len(inside) == 1 and _normed_attention(mixer) is not None else mixer
    called = functions_of_module(type(attention).forward)
    return "ALL_ATTENTION_FUNCTIONS" in called and (attention is not mixer or not inside)


def _normed_attention(mixer: nn.Module) -> nn.Module | None:
    """The attention in a module that has norms beside it and nothing else that could mix tokens (DBRX); None for any
    other module.
    """
    mixing = [child for child in mixer.children() if _mixes(child)]
    others = [child for child in mixer.children() if child not in mixing]
    is_plain = all("norm" in type(child).__name__.lower() for child in others) and not convolves(mixer)
    return mixing[0] if others and is_plain and len(mixing) == 1 else None


def _mixes(module: nn.Module) -> bool:
    return convolves(module) or not _CACHES.isdisjoint(_arguments(module))


def convolves(module: nn.Module) -> bool:
    """Whether one of the module's own parts is a convolution."""
    return any(isinstance(child, nn.Conv1d) for child in module.children())


def _arguments(module: nn.Module) -> Collection[str]:
    return inspect.signature(type(module).forward).parameters.keys()


_find_packed = masking_utils.find_packed_sequence_indices


def _find_documents(position_ids: Tensor) -> Tensor | None:
    """Keep transformers from searching position_ids for documents whenever it makes a mask, which waits for the device.
    In a row the documents are known, and `of_row` puts them into the mask. The positions of a slice would be too few
    for that, and would hide a prefix.
    """
    return _find_packed(position_ids) if row_at_work() is None else None


_chunked = masking_utils.chunked_overlay


def _chunks_of_row(chunk_size: int, left_padding: Tensor) -> Callable[..., Any]:
    """Whether two tokens are in one chunk, which counts from the beginning of their document. Where that is follows
    from the key alone, because `Documents.masked` may move a query to behind the prefix that it goes on from."""
    row = row_at_work()
    if row is None or row.numbers is None:
        return _chunked(chunk_size, left_padding)
    places = row.places[0]

    def in_one_chunk(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        place = places[kv_idx]
        return place // chunk_size == (q_idx - kv_idx + place) // chunk_size

    return in_one_chunk


_interface = AttentionInterface.get_interface


def _interface_of_row(known: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function that a layer is about to call, with any kernel: document by document if the mask of
    several was left out, and across the ranks that share the row, if some do.
    """
    attend, row = _interface(known, name, default), row_at_work()
    if row is not None and row.unmasked:
        attend = functools.partial(attend_by_documents, attend, row)
    return attend if row is None or row.peers is None else functools.partial(attend_across, attend, row.peers)


def of_row(make: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `make` of a mask, with the borders of the row's documents. SDPA needs no mask for documents that it
    computes one by one, because each is causal.
    """

    def mask(*, mask_function: Callable[..., Any] = causal_mask_function, **given: Any) -> Any:
        row = row_at_work()
        if row is not None and row.peers is not None:
            given["q_length"] = given["kv_length"] = sum(row.lengths)
        if row is not None and row.numbers is not None:
            is_plain = mask_function is causal_mask_function and given.get("attention_mask") is None
            if row.are_told and is_plain and make is sdpa_mask:
                row.unmasked = True
                return None
            mask_function = row.masked(mask_function)
            given["allow_is_causal_skip"] = given["allow_is_bidirectional_skip"] = False
        return make(mask_function=mask_function, **given)

    return mask


sdpa_mask_of_row = of_row(sdpa_mask)


def _for_row(forward: Callable[..., Any], are_told: bool) -> Callable[..., Any]:
    """The forward of a model's body, for the row that its position_ids describe, whose layers `are_told` the documents
    without a mask. A row that is at work already is this one: its masks may have been made before the body. A body that
    takes no positions computes one document, with nothing but padding behind it."""
    taken = "position_ids" in inspect.signature(forward).parameters

    @functools.wraps(forward)
    def over_row(*arguments: Any, **given: Any) -> Any:
        positions = given.pop("position_ids", None)
        if positions is None or not taken:
            return forward(*arguments, **given)
        row = row_at_work() or described(positions, are_told)
        if row.numbers is not None and isinstance(made := given.get("attention_mask"), dict):
            given["attention_mask"] = _with_borders(made, row, given["inputs_embeds"])
        with AtWork(row):
            return forward(*arguments, position_ids=positions, **given)

    return over_row


def _with_borders(made: dict[str, Any], row: Documents, states: Tensor) -> dict[str, Any]:
    """Masks of a row that were made before the body. A plainly causal one is left out among them; it needs the borders
    of the documents."""
    if all(mask is not None for mask in made.values()):
        return made
    causal = None
    if row.are_told:
        row.unmasked = True
    else:
        tokens = sum(row.lengths)  # also of a row that ranks share
        seen = row.masked(causal_mask_function)
        causal = sdpa_mask(1, tokens, tokens, mask_function=seen, allow_is_causal_skip=False, device=states.device)
    return {name: causal if mask is None else mask for name, mask in made.items()}


def _in_batches(mixer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of `mixer` for each batch of documents of a row."""
    is_divided = divides(mixer)

    @functools.wraps(forward)
    def in_batches(*arguments: Any, **given: Any) -> Any:
        row, given = row_at_work(), {name: value for name, value in given.items() if name not in _BORDERS}
        if row is not None and row.prefixes:
            raise CannotDivide(f"its {type(mixer).__name__} mixes tokens by something else than plain attention")
        with _unfused(mixer):
            if row is None or row.peers is None:
                return by_documents(row, forward, arguments, given)
            if not is_divided:
                return on_whole_row(row, forward, arguments, given)
            result = forward(*arguments, **given)
            return result if isinstance(result, Tensor) else (result[0], *(None for _ in result[1:]))

    return in_batches


@contextmanager
def _unfused(mixer: nn.Module) -> Iterator[None]:
    """Inside, `mixer` calls its projections. A layer with a convolution whose own flag says that it trains hands the
    weights of its projections to one kernel of mamba-ssm, where that is installed; here they may be packed, or have
    adapters around them."""
    training = mixer.training
    mixer.training = training and not convolves(mixer)
    try:
        yield
    finally:
        mixer.training = training
