"""Virtual tokens in a model, as a prompt or as a prefix of each document.

With a prompt (arXiv:2104.08691) every document begins with them, and their embeddings are learnt. With a prefix
(arXiv:2101.00190) there are learnt keys and values before those of each document, in every attention layer. Prefix keys
are not rotated, and a document's tokens take the positions behind them, as in PEFT.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from trainer.model.attention import VARLEN, no_mask, varlen_attention
from trainer.model.documents import sdpa_mask_of_row
from trainer.model.parts import body
from trainer.model.rows.attention import causal
from trainer.model.rows.row import set_documents_apart


class LearntPrompt(nn.Module):
    """The embeddings of P virtual tokens. Parameter: weight (P, hidden)."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)
        self.active = True

    def forward(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """(1, T, hidden) and (1, T): a token at position i < P of its document becomes virtual token i."""
        tokens = len(self.weight)
        chosen = nn.functional.embedding(position_ids.clamp(max=tokens - 1), self.weight)
        return torch.where((position_ids < tokens).unsqueeze(-1), chosen, embeddings)


def add_prompt(model: PreTrainedModel, start: Tensor) -> LearntPrompt:
    """Make `model` put a prompt into the first P positions of each document. It starts as `start` (P, hidden).

    While the prompt is not `active`, these positions are documents of their own that no other token sees. The rest of
    the row is then computed as if they were not there.
    """
    prompt, tokens = LearntPrompt(start), len(start)
    model.add_module("prompt", prompt)

    def enter(_module: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = given["position_ids"]
        if prompt.active:
            embeddings = model.get_input_embeddings()(given.pop("input_ids"))
            return arguments, {**given, "inputs_embeds": prompt(embeddings, positions)}
        set_documents_apart(tokens)
        given["position_ids"] = torch.where(positions < tokens, positions, positions - tokens)
        if "cu_seq_lens_q" in given:
            given["cu_seq_lens_q"] = given["cu_seq_lens_k"] = _apart(given["cu_seq_lens_q"], tokens)
        return arguments, given

    body(model).register_forward_pre_hook(enter, with_kwargs=True)
    return prompt


def _apart(borders: Tensor, tokens: int) -> Tensor:
    """Add a border behind the first `tokens` of each document, or at its end if it is shorter.

    (documents + 1,) -> (2 * documents + 1,).
    """
    begins, ends = borders[:-1], borders[1:]
    inside = torch.minimum(begins + tokens, ends)
    return torch.cat([torch.stack([begins, inside], dim=1).flatten(), borders[-1:]])


def add_prefixes(model: PreTrainedModel, layers: Sequence[Any], starts: Iterable[Tensor]) -> None:
    """Give each of the attention `layers` of `model` the parameter `prefix` (2, kv_heads, P, head): P keys and values.

    The parameter is the attention module's own, so that ZeRO-3 gathers it there. While a layer's `attends_to_prefix` is
    false, in all layers alike, the model computes as it would without prefixes.
    """
    for layer, start in zip(layers, starts, strict=True):
        layer.prefix = nn.Parameter(start)
        layer.attends_to_prefix = True
    kernel = model.config._attn_implementation
    assert kernel
    attend, mask = {"sdpa": (_sdpa, sdpa_mask_of_row), VARLEN: (_varlen, no_mask)}[kernel]
    AttentionInterface.register(f"{kernel}_with_prefix", attend)
    AttentionMaskInterface.register(f"{kernel}_with_prefix", mask)
    model.config._attn_implementation = f"{kernel}_with_prefix"
    tokens = layers[0].prefix.shape[2]

    def shift(_module: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if layers[0].attends_to_prefix:
            given["position_ids"] = given["position_ids"] + tokens
        return arguments, given

    body(model).register_forward_pre_hook(shift, with_kwargs=True)


@torch.no_grad()
def keys_and_values(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """The rotated keys and the values of a text of `tokens` (P,), for each attention layer: (2, kv_heads, P, head)."""
    cache, training = DynamicCache(), model.training
    borders = torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device)
    model.eval()
    body(model)(
        input_ids=tokens[None],
        cache=cache,
        use_cache=True,
        cu_seq_lens_q=borders,
        cu_seq_lens_k=borders,
        max_length_q=len(tokens),
        max_length_k=len(tokens),
    )
    model.train(training)
    return [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # type: ignore[union-attr]


def _sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """SDPA. Every token of a row, or of a batch of documents, sees the one prefix before the row's own keys."""
    if module.attends_to_prefix:
        tokens = module.prefix.shape[2]
        if attention_mask is None:  # one document, which SDPA alone would take for causal from its first key on
            attention_mask = causal(query, key)
        key, value = (
            torch.cat([prefix.expand(len(own), -1, -1, -1), own], dim=2)
            for prefix, own in zip(module.prefix, (key, value), strict=True)
        )
        attention_mask = nn.functional.pad(attention_mask, (tokens, 0), value=True)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)


def _varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    **given: Any,
) -> tuple[Tensor, None]:
    """PyTorch's varlen kernel. The keys of each document are a copy of the prefix, then its own."""
    if module.attends_to_prefix:
        tokens = module.prefix.shape[2]
        source = prefixed(cu_seq_lens_k, tokens, key.shape[2])
        both = (torch.cat([prefix[None], own], dim=2) for prefix, own in zip(module.prefix, (key, value), strict=True))
        key, value = (part.index_select(2, source) for part in both)
        documents = torch.arange(len(cu_seq_lens_k), dtype=torch.int32, device=source.device)
        cu_seq_lens_k, max_length_k = cu_seq_lens_k + tokens * documents, max_length_k + tokens
    lengths = {"max_length_q": max_length_q, "max_length_k": max_length_k}
    borders = {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
    return varlen_attention(module, query, key, value, attention_mask, **borders, **lengths, **given)


def prefixed(borders: Tensor, tokens: int, length: int) -> Tensor:
    """The source of each key as a place in [prefix, row], (length + tokens * documents,) int64.

    The row has `length` tokens with `borders` (documents + 1,), and every document gets a prefix of `tokens` tokens.
    The function does not wait for the GPU."""
    places = torch.arange(length + tokens * (len(borders) - 1), device=borders.device)
    begins = borders + tokens * torch.arange(len(borders), device=borders.device)
    document = torch.bucketize(places, begins[1:], right=True)
    within = places - begins[document]
    return torch.where(within < tokens, within, borders[document] + within)
