"""Which attention kernel runs, picked once, and the reason for the log.

All of them honour document borders: flash-attn and PyTorch's varlen kernel through cu_seqlens, SDPA and the eager one,
which is plain matrix products and holds all scores at once, through block-diagonal masks; see trainer/model/documents.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from trainer.errors import ConfigError
from trainer.model.documents import sdpa_mask_of_row

VARLEN = "capstan_varlen"
SINKS = "capstan_sinks"  # SDPA, a word that transformers looks for in a name, to refuse it
KERNELS = ("flash_attention_2", "varlen", "sdpa", "eager")  # in the order of preference
_WIDEST = 256  # a head in flash-attn, and in PyTorch's varlen kernel, which is flash-attn's
_OWN = "this base's attention is more than it computes"
# The names that transformers gives what a layer's attention has beyond softmax(QK)V.
_BEYOND = ("softcap", "s_aux", "position_bias", "indices")


@dataclass(frozen=True)
class Attention:
    """`name` as transformers knows it; `why` is one sentence for the log."""

    name: str
    why: str

    def arguments(
        self, cu_seqlens: Tensor, max_seqlen: int, cu_seqlens_k: Tensor | None = None, max_seqlen_k: int | None = None
    ) -> dict[str, Any]:
        """The arguments of the model's forward, beside input_ids and position_ids, that keep packed documents apart. A document
        has more keys than tokens where those of earlier tokens were kept; without borders of their own, as many."""
        if self.name not in ("flash_attention_2", VARLEN):
            return {}
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens if cu_seqlens_k is None else cu_seqlens_k,
            "max_length_q": max_seqlen,
            "max_length_k": max_seqlen if max_seqlen_k is None else max_seqlen_k,
        }


class AttentionNeeds(Protocol):
    """The computations of a base's attention beyond softmax(QK)V; see trainer.base.architecture.Architecture."""

    @property
    def caps_attention(self) -> bool: ...
    @property
    def has_sinks(self) -> bool: ...
    @property
    def supports_sdpa(self) -> bool: ...
    @property
    def supports_flash(self) -> bool: ...
    @property
    def widest_head(self) -> int: ...


def choose_attention(
    setting: str,
    device: torch.device,
    dtype: torch.dtype,
    needs: AttentionNeeds,
    refused: Mapping[str, str] | None = None,
) -> Attention:
    """Resolve `model.attention`; raises `ConfigError` when the named kernel cannot run here, or not this base.

    `refused` gives the reason for each kernel that the run's method cannot compute with.
    """
    missing = {**unavailable(device, dtype), **unable(needs), **(refused or {})}
    if setting == "auto":
        kernel = next(name for name in KERNELS if name not in missing)
        why = "; ".join(f"no {name}: {reason}" for name, reason in missing.items()) or "fastest available"
    elif setting in missing:
        raise ConfigError(f"model.attention: {setting!r} cannot run here: {missing[setting]}. Use auto.")
    else:
        kernel, why = setting, "set by model.attention"
    if kernel == "varlen":
        AttentionInterface.register(VARLEN, varlen_attention)
        AttentionMaskInterface.register(VARLEN, no_mask)
        return Attention(VARLEN, why)
    if kernel == "sdpa" and needs.has_sinks:
        AttentionInterface.register(SINKS, sdpa_with_sinks)
        AttentionMaskInterface.register(SINKS, sdpa_mask_of_row)
        return Attention(SINKS, why)
    return Attention(kernel, why)


def unable(needs: AttentionNeeds) -> dict[str, str]:
    """Kernel -> why it would give other results than the base's own attention."""
    reasons: dict[str, str] = {}
    if not needs.supports_flash:
        reasons = dict.fromkeys(("flash_attention_2", "varlen"), "it takes no mask, which this base's attention needs")
    elif needs.widest_head > _WIDEST:
        wide = f"it takes heads of up to {_WIDEST}, and this base has some of {needs.widest_head}"
        reasons = dict.fromkeys(("flash_attention_2", "varlen"), wide)
    if needs.caps_attention:
        return reasons | dict.fromkeys(("varlen", "sdpa"), "it does not cap attention logits, as this base does")
    if needs.has_sinks:
        reasons |= dict.fromkeys(("flash_attention_2", "varlen"), "it has no attention sinks, as this base has")
        return reasons if needs.supports_flash else reasons | {"sdpa": _OWN}
    return reasons if needs.supports_sdpa else reasons | {"sdpa": _OWN}


def unavailable(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Kernel -> why it cannot run on this device."""
    reasons: dict[str, str] = {}
    if device.type != "cuda":
        reasons = {name: "it needs a CUDA device" for name in ("flash_attention_2", "varlen")}
    elif dtype == torch.float32:
        reasons = {name: "it needs model.dtype: bf16" for name in ("flash_attention_2", "varlen")}
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reasons = {name: "it needs an Ampere GPU or newer" for name in ("flash_attention_2", "varlen")}
    elif find_spec("flash_attn") is None:
        reasons["flash_attention_2"] = "the flash-attn package is not installed (pip install 'capstan-llm[flash-attn]')"
    return reasons


def no_mask(*_args: Any, **_kwargs: Any) -> None:
    """Borders travel as cu_seqlens."""


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
    """query and key (1, heads or kv_heads, T or K, head_dim), value (1, kv_heads, K, value_dim) -> (1, T, heads, value_dim).

    A document's tokens are the last of its keys, of which it may have more. Values that are narrower than keys, as in latent
    attention, are widened with zeros for the kernel, which wants all alike.
    """
    from torch.nn.attention import varlen

    assert all(beyond.get(name) is None for name in _BEYOND), (
        f"varlen attention computes none of {_BEYOND}: see unable()"
    )
    width = value.shape[-1]
    value = nn.functional.pad(value, (0, key.shape[-1] - width))
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
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[..., :width].unsqueeze(0), None


def causal(query: Tensor, key: Tensor) -> Tensor:
    """The mask (1, 1, T, K) of one document, whose tokens are the last of its keys; query (..., T, head), key (..., K, head)."""
    tokens, keys = query.shape[-2], key.shape[-2]
    return torch.ones(1, 1, tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)


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
    """SDPA, as transformers calls it, where a head's softmax has a term more, its sink, which weighs no value; `s_aux` (heads,).

    The term is the score of one more key, whose value is zero: with a feature that is 1 in this key and 0 in the others, and in
    all queries of a head sink / scaling. Eight features and keys, as kernels on GPUs want widths that eight divides.
    """
    assert all(beyond.get(name) is None for name in ("softcap", "position_bias", "indices"))
    if s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **beyond)
    more = 8
    if attention_mask is None:  # one document, which SDPA alone would take for causal
        attention_mask = causal(query, key)
    first = torch.arange(more, device=query.device) == 0
    sink = (s_aux / scaling).to(query.dtype)[:, None, None] * first
    query = torch.cat([query, sink.expand(*query.shape[:3], more)], dim=3)
    key = nn.functional.pad(key, (0, more))
    added = nn.functional.pad(first.to(key.dtype), (key.shape[3] - more, 0)).expand(*key.shape[:2], more, -1)
    key, value = torch.cat([key, added], dim=2), nn.functional.pad(value, (0, 0, 0, more))
    attention_mask = torch.cat([attention_mask, first.expand(*attention_mask.shape[:3], more)], dim=3)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **beyond)
