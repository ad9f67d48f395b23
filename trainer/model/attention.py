"""Chooses the attention kernel that runs, once, with the reason for the log.

All of them honour document borders: flash-attn's and PyTorch's varlen kernel through cu_seqlens, flex_attention and the
eager one, which is plain matrix products and holds all scores at once, through masks, and SDPA document by document, or
through a mask too; see trainer/model/documents.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from trainer.errors import ConfigError
from trainer.model.documents import sdpa_mask_of_row
from trainer.model.kernels.attention import FLASH, AttentionNeeds, chosen_kernel, unable, unavailable
from trainer.model.kernels.flex import block_mask_of_row, flex_attention_capped
from trainer.model.rows.attention import causal

VARLEN = "capstan_varlen"
SINKS = "capstan_sinks"  # SDPA, spelt so that the name lacks a word that transformers looks for in order to refuse it
FLEX = "capstan_flex"
# transformers' names for what a layer's attention has beyond softmax(QK)V.
_BEYOND = ("softcap", "s_aux", "position_bias", "indices")


@dataclass(frozen=True)
class Attention:
    """`name` as transformers knows it; `why` is one sentence for the log."""

    name: str
    why: str

    def arguments(
        self, cu_seqlens: Tensor, max_seqlen: int, of_keys: tuple[Tensor, int] | None = None
    ) -> dict[str, Any]:
        """The arguments of the model's forward, beside input_ids and position_ids, that keep packed documents separate.

        One text whose earlier keys were kept has borders `of_keys` beside those of its new tokens. flash-attn is not
        told them: a layer with a window keeps fewer keys than they say, and transformers calls it for one text by the
        keys that are there.
        """
        if self.name not in (*FLASH, VARLEN) or (self.name in FLASH and of_keys):
            return {}
        cu_seqlens_k, max_seqlen_k = of_keys or (cu_seqlens, max_seqlen)
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens_k,
            "max_length_q": max_seqlen,
            "max_length_k": max_seqlen_k,
        }


def choose_attention(
    setting: str,
    device: torch.device,
    dtype: torch.dtype,
    needs: AttentionNeeds,
    refused: Mapping[str, str] | None = None,
    *,
    masked: bool = False,
) -> Attention:
    """Resolve `model.attention`. Raises `ConfigError` if the named kernel cannot run here, or not with this base.

    `refused` gives the reason for each kernel that the run's method cannot compute with; with `masked` its rows have a
    mask that is more than borders of documents.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    missing = {
        **unavailable(capability, dtype != torch.float32, needs),
        **unable(needs, masked=masked),
        **(refused or {}),
    }
    if setting in missing:
        raise ConfigError(f"model.attention: {setting!r} cannot run here: {missing[setting]}. Use auto.")
    kernel, why = chosen_kernel(setting, missing)
    return Attention(_registered(kernel, needs), why)


def _registered(kernel: str, needs: AttentionNeeds) -> str:
    """The name by which transformers calls the kernel and makes its masks."""
    ours = {
        "varlen": (VARLEN, varlen_attention, no_mask),
        "flex_attention": (FLEX, flex_attention_capped, block_mask_of_row),
    }
    if needs.has_sinks:
        ours["sdpa"] = (SINKS, sdpa_with_sinks, sdpa_mask_of_row)
    if kernel not in ours:
        return kernel
    name, attend, mask = ours[kernel]
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    return name


def no_mask(*_args: Any, **_kwargs: Any) -> None:
    """No mask, because borders travel as cu_seqlens."""


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    **beyond: Any,
) -> tuple[Tensor, None]:
    """query and key (1, heads or kv_heads, T or K, head_dim), value (1, kv_heads, K, value_dim) -> (1, T, heads,
    value_dim).

    A document's tokens are the last of its keys, of which it may have more. Values that are narrower than keys, as in
    latent attention, are widened with zeros for the kernel, which wants all alike.
    """
    from torch.nn.attention import varlen

    if max_length_k > key.shape[2]:  # For one growing text, a layer with a window keeps no more keys than it sees.
        cu_seq_lens_k, max_length_k = cu_seq_lens_k.clamp(max=key.shape[2]), key.shape[2]
    assert all(beyond.get(name) is None for name in _BEYOND), (
        f"varlen attention computes none of {_BEYOND}: see unable()"
    )
    width = value.shape[-1]
    value = nn.functional.pad(value, (0, key.shape[-1] - width))
    groups = query.shape[1] // key.shape[1]
    given: dict[str, Any] = {"enable_gqa": groups > 1}
    if "enable_gqa" not in _arguments(varlen.varlen_attn):  # torch before 2.12 needs a key head for each head
        key, value, given = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), {}
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    out = varlen.varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        scale=scaling,
        # (left, right): causal is a right window of 0; transformers counts the token itself into its window.
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        **given,
    )
    assert isinstance(out, Tensor)
    return out[..., :width].unsqueeze(0), None


@cache
def _arguments(function: Any) -> frozenset[str]:
    return frozenset(signature(function).parameters)


def sdpa_with_sinks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    s_aux: Tensor | None = None,
    **beyond: Any,
) -> tuple[Tensor, None]:
    """SDPA, as transformers calls it, with one more term in each head's softmax: its sink, which weighs no value;
    `s_aux` (heads,).

    The term is the score of one more key, whose value is zero: with a feature that is 1 in this key and 0 in the
    others, and in all queries of a head sink / scaling. Eight features and keys, as kernels on GPUs want widths that
    eight divides.
    """
    assert all(beyond.get(name) is None for name in ("softcap", "position_bias", "indices"))
    if s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **beyond)
    more = 8
    if attention_mask is None:  # one document, which SDPA would otherwise take for causal
        attention_mask = causal(query, key)
    first = torch.arange(more, device=query.device) == 0
    sink = (s_aux / scaling).to(query.dtype)[:, None, None] * first
    query = torch.cat([query, sink.expand(*query.shape[:3], more)], dim=3)
    key = nn.functional.pad(key, (0, more))
    added = nn.functional.pad(first.to(key.dtype), (key.shape[3] - more, 0)).expand(*key.shape[:2], more, -1)
    key, value = torch.cat([key, added], dim=2), nn.functional.pad(value, (0, 0, 0, more))
    attention_mask = torch.cat([attention_mask, first.expand(*attention_mask.shape[:3], more)], dim=3)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **beyond)
