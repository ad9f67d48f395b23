"""Counts the values that a decoder layer keeps between its forward and its backward pass, from its linear layers."""

from collections.abc import Sequence
from typing import NamedTuple

from trainer.base.architecture import Architecture, Parameter


class LayerValues(NamedTuple):
    """Values for each token that a decoder layer keeps for its backward pass, and gradients in its widest blocks.

    The gradients are half of those that exist at one time in the widest block, as many as enter its last linear layer.
    Those of attention and of MLPs, which can be tiled, are apart from all others. `mlp_weights` is the number of
    weights of the largest MLP. Liger's kernels save `fused` and `fused_in_mlps` of the kept values: a norm's input in
    16 bits, and the gate's function, which they recompute. If ranks share a row, each keeps `kept_whole` of the kept
    values for all tokens of the row. It also keeps `exchanged`: attention's results, by heads and by tokens."""

    kept: float
    widest: float
    widest_attention: float
    kept_in_mlps: float
    widest_mlp: float
    mlp_weights: int
    fused: float
    fused_in_mlps: float
    kept_whole: float
    exchanged: float


def layer_values(model: Architecture, layer: int, item: int = 2) -> LayerValues:
    """The values that one decoder layer keeps of each token, in values of `item` bytes.

    For each weight of a norm a layer keeps the norm's input in fp32 and its output: three values of 16 bits, or two of
    32. In each block, such as attention or an MLP, it keeps the outputs of all linear layers except the last, the
    inputs of those that do not read the hidden state, and the input of the last. An MLP keeps as much again for the
    gate's function. With h the hidden size, m an MLP's width, q and kv those of queries and keys, a Llama layer has
    6h + 2q + 2kv + 4m. A mixture's matrices count by the share of tokens that visits them.
    """
    kept = fused = 0.0
    blocks = dict[str, list[Parameter]]()
    for part in model.in_layer(layer):
        if part.kind in ("linear", "experts"):
            blocks.setdefault(part.name.removesuffix(".weight").rpartition(".")[0], []).append(part)
        elif len(part.shape) == 1 and part.name.endswith(".weight"):
            kept, fused = kept + (4 // item + 1) * part.numel, fused + (4 // item - 1) * part.numel
    attention = {found.path for found in model.attention}
    widest = widest_attention = kept_in_mlps = widest_mlp = fused_in_mlps = 0.0
    mlp_weights, kept_whole, exchanged = 0, 0.0, 0.0
    for path, parts in blocks.items():
        last = next((part for part in reversed(parts) if model.width in part.shape[:-1]), parts[-1])
        entering = _values(last, model.width, entering=True)
        own, exchanged = entering * (1 if path in attention else 2), exchanged + entering * (path in attention)
        leaving = sum(_values(part, model.width, entering=False) for part in parts if part is not last)
        own += leaving
        if last.kind == "experts":  # their outputs, which the routing weights multiply
            own += last.visits * last.shape[0] * model.width
        own += sum(part.shape[1] for part in parts if part is not last and model.width not in part.shape[1:])
        own += _new_keys([part for part in parts if part is not last], model.width) if path in attention else 0
        if path not in attention and len(parts) > 1 and all(part.kind == "linear" for part in parts):
            kept_in_mlps, widest_mlp = kept_in_mlps + own, max(widest_mlp, entering)
            mlp_weights = max(mlp_weights, sum(part.numel for part in parts))
            fused_in_mlps += entering
        else:
            kept += own
            if path in attention:  # its gradients are those of its results, and of queries, keys and values
                widest_attention = max(widest_attention, (entering + leaving) / 2)
            else:
                widest = max(widest, entering)
            kept_whole += own if any(f"{path}.".startswith(f"{whole}.") for whole in model.computed_whole) else 0
    apart = widest, widest_attention, kept_in_mlps, widest_mlp
    return LayerValues(kept, *apart, mlp_weights, fused, fused_in_mlps, kept_whole, exchanged)


def _new_keys(parts: Sequence[Parameter], hidden: int) -> int:
    """The number of values of a token's keys if the layer assembles them in new memory; 0 in most families.

    If keys and values come from a latent (DeepSeek-V2, arXiv:2405.04434), the keys are concatenated from a linear
    layer's output and a part that all heads share. They have as many values as the queries, whose layer is the first
    that is not a latent's.
    """
    latents = {part.shape[1] for part in parts if hidden not in part.shape[1:]}
    return next(part.shape[0] for part in parts if part.shape[0] not in latents) if latents else 0


def _values(part: Parameter, hidden: int, *, entering: bool) -> float:
    """The values of a token that enter or leave a linear layer, or all experts of a stack.

    A stack may be transposed, so its width is the side that is not `hidden`."""
    if part.kind == "linear":
        return part.shape[1] if entering else part.shape[0]
    experts, rows, columns = part.shape
    return part.visits * experts * (columns if rows == hidden else rows)
