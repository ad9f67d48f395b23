"""The values that a decoder layer keeps between its forward and its backward pass, counted over the layers that it
has.
"""

from collections.abc import Sequence
from typing import NamedTuple

from trainer.base.architecture import Architecture, Parameter


class LayerValues(NamedTuple):
    """The values a token that a decoder layer keeps for its backward pass, and half of the gradients that are there at
    one time in the widest of its blocks, as many as enter its last linear layer: those of attention and of MLPs, which
    can be tiled, apart from all others. `mlp_weights` are those of its largest MLP. Liger's kernels spare `fused` and
    `fused_in_mlps` of what is kept: a norm's input in 16 bits, and the gate's function, which they compute again. Of
    what is kept `kept_whole` is for all tokens of a row on each of the ranks that share it; these keep `exchanged`
    beside it, attention's results as their heads computed them and as their tokens have them."""

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

    For each weight of a norm its input in fp32, and its output: three values of 16 bits, two of 32. In each block, such
    as attention or an MLP: what leaves its linear layers but the last, what enters those that do not read the hidden
    state, and what enters the last; in an MLP as much again, the gate's function. With h the hidden size, m an MLP's
    width, q and kv those of queries and keys, a Llama layer has 6h + 2q + 2kv + 4m. A mixture's matrices count by the
    share of tokens that visits them.
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
        if last.kind == "experts":  # what leaves them, which the weights of the routes multiply
            own += last.visits * last.shape[0] * model.width
        own += sum(part.shape[1] for part in parts if part is not last and model.width not in part.shape[1:])
        own += _new_keys([part for part in parts if part is not last], model.width) if path in attention else 0
        if path not in attention and len(parts) > 1 and all(part.kind == "linear" for part in parts):
            kept_in_mlps, widest_mlp = kept_in_mlps + own, max(widest_mlp, entering)
            mlp_weights = max(mlp_weights, sum(part.numel for part in parts))
            fused_in_mlps += entering
        else:
            kept += own
            if path in attention:  # whose gradients are those of its results, and of queries, keys and values
                widest_attention = max(widest_attention, (entering + leaving) / 2)
            else:
                widest = max(widest, entering)
            kept_whole += own if any(f"{path}.".startswith(f"{whole}.") for whole in model.computed_whole) else 0
    apart = widest, widest_attention, kept_in_mlps, widest_mlp
    return LayerValues(kept, *apart, mlp_weights, fused, fused_in_mlps, kept_whole, exchanged)


def _new_keys(parts: Sequence[Parameter], hidden: int) -> int:
    """The number of values a token that newly made keys have; 0 in most families.

    Where keys and values come out of a latent (DeepSeek-V2, arXiv:2405.04434), the keys are concatenated from a linear
    layer's output and a part that all heads share, so they take memory of their own. They are as many as the queries,
    whose layer is the first that is not a latent's.
    """
    latents = {part.shape[1] for part in parts if hidden not in part.shape[1:]}
    return next(part.shape[0] for part in parts if part.shape[0] not in latents) if latents else 0


def _values(part: Parameter, hidden: int, *, entering: bool) -> float:
    """Values a token that enter or leave a linear layer, or all experts of a stack; those of a stack may be transposed,
    so there it is the width that is not `hidden`."""
    if part.kind == "linear":
        return part.shape[1] if entering else part.shape[0]
    experts, rows, columns = part.shape
    return part.visits * experts * (columns if rows == hidden else rows)
