"""PyTorch's flex_attention, for bases that cap attention logits or have sinks: scores never lie in memory."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from transformers.masking_utils import add_offsets_to_mask_function, causal_mask_function

from trainer.model.documents import of_row


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def flex_attention_capped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **beyond: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, T, head), key and value (1, kv_heads, T, ...), sinks `s_aux` (heads,) -> (1, T, heads,
    value_dim).

    A sink is one more term of a head's softmax and has no value. So it scales the result of the softmax without it by
    e^lse / (e^lse + e^sink). Here lse is the logarithm of the sum of the other terms, in fp32.
    """
    assert all(beyond.get(name) is None for name in ("position_bias", "indices"))

    def cap(score: Tensor, *_place: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    attend: Callable[..., Any] = _compiled() if query.is_cuda else flex_attention
    out, aux = attend(
        query,
        key,
        value,
        score_mod=cap,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if s_aux is not None:
        out = (out * torch.sigmoid(aux.lse - s_aux.float()[:, None])[..., None]).to(query.dtype)
    return out.transpose(1, 2).contiguous(), None


def block_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    device: torch.device | str = "cpu",
    **_rest: Any,
) -> BlockMask:
    """Return transformers' mask for flex_attention, for rows without padding in front. It is compiled only on a GPU."""
    function = add_offsets_to_mask_function(mask_function, q_offset, kv_offset)
    on_gpu = torch.device(device).type == "cuda"
    return create_block_mask(function, batch_size, None, q_length, kv_length, device=str(device), _compile=on_gpu)


block_mask_of_row = of_row(block_mask)
