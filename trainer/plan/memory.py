"""The memory of one GPU, by arithmetic, and how many layers keep their activations in it. No GPU, no torch.

Bytes of stored tensors are exact. Activations and gathered layers are estimates, by the formulas stated at each
function. At the end are the values that a decoder layer keeps between its forward and its backward pass, counted from
its linear layers.
"""

from collections.abc import Sequence
from math import ceil, prod
from typing import NamedTuple

from trainer.base.architecture import Architecture, Parameter
from trainer.config.row_kinds import ROW_KINDS
from trainer.config.training import FP8_AT_ONCE, MLP_TILE
from trainer.plan.inputs import (
    Inputs,
    held_as,
    is_packed,
    multiplies_in_fp8,
    stored_bytes,
    stored_layers,
)
from trainer.plan.needs import GpuMemory
from trainer.plan.resolve import keeps_features, tower_bytes
from trainer.processes.devices import pinned_bytes, place_bytes, places_in_blocks
from trainer.state.optimizer import find_optimizer

# trainer/model/head.py: bytes of logits computed at once, as if in fp32, and of those that are on a CPU and on a GPU.
_LOGITS_CHUNK_BYTES, _LOGITS_CHUNK_ROWS, _LOGITS_BLOCK_BYTES = 2**28, 512, (2**22, 2**26)
# Gradients of a hidden state that the backward pass of a norm has at one time, by the bytes of a value, and for a norm
# that is one kernel. PyTorch computes the norm in fp32: for 16-bit values it has five tensors of four bytes, for fp32
# values four, because some are the same tensor (benchmarks/length.py --device).
_NORM_GRADIENTS, _FUSED_NORM_GRADIENTS = {2: 10, 4: 4}, 2
# trainer/state/zero/gather.py: layers that are whole on a GPU at one time.
_LAYERS_GATHERED = 3
# CUDA's context and the allocator's slack, and the buffers of an NCCL communicator: 16 channels of 4 MiB
# (NCCL_BUFFSIZE) to send and to receive. These are allowances, not measurements.
_CONTEXT_BYTES = 3 * 2**28
_COMMUNICATOR_BYTES = 2**27


def base_bytes(given: Inputs) -> int:
    """Return the bytes of one whole copy of the base as it is stored."""
    return sum(stored_layers(given.config, given.model)) + given.item * given.model.weights(
        "embedding", "head", "small"
    )


def memory_of(given: Inputs) -> GpuMemory:
    """Return the bytes on one GPU.

    Frozen parameters take their stored bytes, divided by the ranks that share one copy. They take nothing if they are
    offloaded. Frozen parameters under ZeRO-3's persistence threshold are also held whole, and are never offloaded:
    norms, and scales if the adapters are wide.

    Learning parameters, adapters or the base itself, take the 16-bit partition, and a whole copy if a parameter is
    under ZeRO-3's persistence threshold. The fp32 master, the optimizer's states and the accumulated gradient (with
    AdamW 16 bytes an element) are divided by the world size.
    """
    config, model, world_size = given.config, given.model, given.world_size
    parts = (part for layer in range(model.layers) for part in model.in_layer(layer) if is_packed(part, config.quant))
    packed = sum(stored_bytes(part, config.quant, given.item) for part in parts)
    unquantized = base_bytes(given) - packed
    unquantized -= given.item * given.learning_base
    whole = given.small if world_size > 1 else 0
    kept, backward = _activations(given)
    kept_of_pictures, seen_backward = _of_pictures(given)
    passes = {
        "gathered_layers": _gathered(given),
        "dequantized_weight": _dequantized(given) + _in_fp8(given),
        "whole_gradient": (4 + given.item) * max(given.learning.values(), default=0),
        "activations": kept + backward + _masks(given),
        # The backward pass of the tower is the last one of a row, when nothing of the decoder is left.
        "tower_activations": kept_of_pictures + max(0, seen_backward - kept - backward),
        "logits": max(0, _logits(given) - backward),
    }
    parts = {
        "frozen_quantized": 0 if given.offloaded else ceil(packed / given.group),
        "frozen_unquantized": 0 if given.offloaded else ceil(unquantized / given.group),
        "frozen_whole": _frozen_whole(given),
        "frozen_tower": _tower(given),
        "adapter_weights": given.item * (whole + given.share),
        "adapter_states": 0 if given.states_offloaded else given.state_bytes,
        "gradient_buckets": _gradient_buckets(given),
        **passes,
        "optimizer_step": 0 if given.states_offloaded else max(0, optimizer_step(given) - sum(passes.values())),
        "context": _CONTEXT_BYTES if given.on_gpu else 0,
        "communicators": given.communicators * _COMMUNICATOR_BYTES,
    }
    return GpuMemory(**parts, total=sum(parts.values()))


def _frozen_whole(given: Inputs) -> int:
    """Return the bytes of small frozen parameters that are held whole beside this rank's partition.

    The partition is a part of the frozen bytes unless those are offloaded.
    """
    small = sum(stored.bytes for stored in given.frozen if given.is_whole(stored))
    share = ceil(small / given.group)
    return (small if given.group > 1 else 0) + (share if given.offloaded else 0)


def _tower(given: Inputs) -> int:
    """Return the bytes of the base's tower, which is whole on each rank unless its features are kept."""
    return 0 if keeps_features(given.config, given.model) else tower_bytes(given.config, given.model)


def offloaded_base(given: Inputs) -> int:
    """Return the bytes of host memory for a rank's offloaded partitions of the base.

    Each partition is a block of its own, pinned if the policy says so.
    """
    if not given.offloaded:
        return 0
    parts = [ceil(stored.elements / given.group) * stored.item for stored in given.frozen if not given.is_whole(stored)]
    return sum(map(pinned_bytes, parts) if given.pins("offload_param") else parts)


def offloaded_states(given: Inputs) -> int:
    """Return the bytes of host memory for a rank's offloaded masters, moments and gradients, with the update.

    Gradients are pinned if the policy says so: the summed ones, and the fp32 copy of each sub-group that its update
    takes.
    """
    if not given.states_offloaded:
        return 0
    gradient, group = 4 * given.share, 4 * given.sub_group
    whole_groups, rest = divmod(gradient, group)
    gradients = [gradient, *[group] * whole_groups, rest]
    return (
        given.state_bytes
        - gradient
        + sum(map(pinned_bytes, gradients) if given.pins("offload_optimizer") else gradients)
        + optimizer_step(given)
    )


def _dequantized(given: Inputs) -> int:
    """Return the bytes of the packed weights that are in 16 bits at one moment.

    They are one matrix, those of a tiled MLP, or as many of a mixture's experts as are multiplied at once. What their
    format needs to decode them operator by operator comes on top on CPUs. A GPU's kernel needs nothing, unless it moves
    their codes by a change.
    """
    sizes = [
        max(given.item * parameter.matrices[0], min(given.experts_at_once, given.item * parameter.numel))
        for parameter in given.model.parameters
        if is_packed(parameter, given.config.quant)
    ]
    if sizes:
        layers = range(given.model.layers)
        tiled = (layer_values(given.model, place).mlp_weights for place in layers if _tile(given, place) < 1)
        sizes.append(given.item * max(tiled, default=0))
    held = (held_as(parameter, given.config.quant) for parameter in given.model.parameters)
    by_kernel = given.on_gpu and not given.method.through
    beside = 0 if by_kernel else max((form.decoding_bytes for form in held), default=0)
    return max(sizes, default=0) + beside


def _in_fp8(given: Inputs) -> int:
    """Return the bytes of a product's factors in FP8.

    They are the scaled factors in 16 bits and in 8 bits, and the weight's in another order. A
    mixture converts some experts at a time, although it multiplies more at once.
    """
    sizes = [0]
    for one in given.model.parameters:
        if not multiplies_in_fp8(given.config, one):
            continue
        weights, rows, converted = prod(one.shape), given.tokens, prod(one.shape)
        if one.kind == "experts":
            rows = ceil(rows * one.visits * one.shape[0])
            weights = min(weights, max(one.matrices[0], given.experts_at_once // given.item))
            converted = min(weights, max(one.matrices[0], FP8_AT_ONCE))
        sizes.append(weights + 3 * converted + 3 * rows * max(one.shape[-2:]))
    return max(sizes)


def optimizer_step(given: Inputs) -> int:
    """Return the bytes of the update after the passes have freed theirs, for one sub-group of DeepSpeed's at a time."""
    portion = min(given.share, given.sub_group)
    largest = ceil(max(given.learning.values(), default=0) / given.world_size)
    on_gpu = given.on_gpu and not given.states_offloaded
    return find_optimizer(given.config.optim).step_bytes(portion, largest, on_gpu)


def _gathered(given: Inputs) -> int:
    """Return the bytes of the base's parameters that are whole on a GPU at one moment.

    trainer/state/zero/gather.py gathers them. In the middle of a pass there are the layer that the device computes and
    the next one, which the host has reached. Besides, there are the flat buffers of this layer and of the layer that is
    gathered next. At the turn from forward to backward there are the head and the layer before it. Parameters that the
    policy keeps within stage3_max_reuse_distance come on top, half of them on either side of the turn. The sum is never
    more than the whole base. It is nothing when a partition is the whole parameter.
    """
    if given.group == 1 and not given.offloaded:
        return 0
    layer = max(stored_layers(given.config, given.model))
    turn = given.item * given.model.largest("embedding", "head") + layer
    # A quantized parameter consists of bytes, any other of 16- or 32-bit values.
    element_bytes = 1 if given.config.quant.held.packs else given.item
    kept = given.zero.get("stage3_max_reuse_distance", 0) // 2 * element_bytes
    return min(base_bytes(given), max(_LAYERS_GATHERED * layer, turn) + kept)


def _gradient_buckets(given: Inputs) -> int:
    """Return the bytes of DeepSpeed's bucket of fp32 gradients, and of the flat copies for its reduction.

    On a CPU the bucket takes only as much memory as gradients are written to.
    """
    bucket = given.zero.get("reduce_bucket_size", 500_000_000)
    written = min(bucket, given.trainable)
    reduced = written if given.world_size > 1 else 0
    return 4 * ((bucket if given.on_gpu else written) + reduced + ceil(reduced / given.world_size))


def _activations(given: Inputs) -> tuple[int, int]:
    """Return the bytes of activations of one micro-batch of T tokens. The attention kernel keeps no score matrix.

    The first number counts the activations that the forward pass leaves. The second counts those that the backward pass
    of a layer adds, when the logits are gone.

    The counts follow Korthikanti et al. (arXiv:2205.05198, section 4), with frozen linear layers; see `layer_values`.
    The last layers may keep their activations. Any other layer keeps its hidden state, and is computed again in its
    backward pass, when those of later layers are gone. On top come the widest gradients: a hidden state, and two of the
    input of a block's last linear layer. If MLPs are tiled, theirs are there for one tile only. If inputs are
    offloaded, two of them are on the GPU. Liger's kernels count if they are set, because with auto a run finds out
    itself whether they fit the base.
    """
    model = given.model
    again = given.recomputed_layers
    kept, widest = zip(*(_layer(given, place) for place in range(model.layers)), strict=True)
    inputs = min(2, again) if given.offloads_inputs else again
    from_forward = inputs * model.width + sum(kept[again:])
    computed_again = max(0, max(kept[:again], default=0) - sum(kept[again:]))
    in_backward = computed_again + 2 * max(widest) + model.width
    value = given.item * given.tokens
    return ceil(value * from_forward), ceil(value * in_backward)


def _of_pictures(given: Inputs) -> tuple[int, int]:
    """Return the bytes that the tower keeps, if it learns, and those that its backward pass adds.

    They are those of rows that are full of pictures. Its layers come before those of the decoder, so they keep their
    activations only if all of the decoder's do. Its backward pass has two gradients as large as the largest kept
    tensor, and what it computes again of a layer. Ranks that share a row each have all of its pictures.
    """
    found, again = given.model.kept_of_pictures, given.recomputed_layers > 0
    if found is None:
        return 0, 0
    tokens, (of_row, of_token) = given.config.train.micro_batch * given.row, found.recomputed if again else found.plain
    return ceil(of_row + of_token * tokens), ceil(tokens * (2 * found.largest + again * found.layer))


def _masks(given: Inputs) -> int:
    """Return the bytes of the mask, T x T, that SDPA takes for windows (trainer/model/documents.py).

    The mask counts as it is made, and in values for each layer that keeps its activations.
    """
    kernel, tokens = given.config.model.attention, given.config.train.micro_batch * given.row
    sees = ROW_KINDS[given.config.data.kind].sees  # such rows are computed with SDPA
    sdpa = kernel == "sdpa" or (kernel == "auto" and (sees or not given.on_gpu))
    masked = [one.layer for one in given.model.attention if sdpa and one.window and one.window < tokens]
    kept = sum(layer >= given.recomputed_layers for layer in masked)
    return tokens**2 * (1 + given.item * max(1, kept)) if masked else 0


def offloaded_activations(given: Inputs) -> int:
    """Return the bytes of pinned host memory for the inputs of a rank's recomputed layers.

    They lie together (trainer/model/activations.py).
    """
    if not given.offloads_inputs:
        return 0
    size = place_bytes(given.item * given.tokens * given.model.width)
    return sum(pinned_bytes(places * size) for places in places_in_blocks(size, given.recomputed_layers))


def _layer(given: Inputs, place: int) -> tuple[float, float]:
    """Return the values a token that a layer keeps, and the largest width into the last linear layer of a block."""
    values, tile = layer_values(given.model, place, given.item), _tile(given, place)
    kept = values.kept + (given.shared - 1) * values.kept_whole + tile * values.kept_in_mlps
    exchanged = values.exchanged * (given.shared > 1)
    norms = _NORM_GRADIENTS[given.item]
    if given.on_gpu and given.config.model.kernels == "liger":
        kept -= values.fused + tile * values.fused_in_mlps
        norms = _FUSED_NORM_GRADIENTS
    # In attention's own backward pass one of the two copies of its results is gone.
    attention = values.widest_attention - exchanged / 2
    # In the backward pass of the norm before an MLP, what the MLP kept is gone. If the MLP is tiled, that is next to
    # nothing.
    norm = (norms * given.model.width - tile * values.kept_in_mlps) / 2 if values.kept_in_mlps else 0
    return kept + exchanged, max(values.widest, attention, norm, tile * values.widest_mlp)


def _tile(given: Inputs, place: int) -> float:
    """Return the share of a row that the MLPs of a layer compute at a time."""
    longest = given.config.train.longest_mlp(recomputed=place < given.recomputed_layers)
    return 1.0 if longest is None or given.tokens <= longest else MLP_TILE / given.tokens


def _logits(given: Inputs) -> int:
    """Return the bytes of the chunked loss.

    They are the logits of a chunk's tokens, which their gradient replaces, the logits that are in fp32 at one time with
    what is computed of them, and the gradient of the hidden states of all T tokens.
    """
    model, tokens = given.model, given.tokens
    chunk = min(
        tokens, max(1, _LOGITS_CHUNK_BYTES // (4 * model.vocabulary) // _LOGITS_CHUNK_ROWS) * _LOGITS_CHUNK_ROWS
    )
    in_fp32 = min(4 * chunk * model.vocabulary, _LOGITS_BLOCK_BYTES[given.on_gpu])
    copies = 2 if given.item < 4 else 1  # logits in fp32 are not copied
    return chunk * model.vocabulary * given.item + copies * in_fp32 + given.item * tokens * model.hidden


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
    places_in_blocks = dict[str, list[Parameter]]()
    for part in model.in_layer(layer):
        if part.kind in ("linear", "experts"):
            places_in_blocks.setdefault(part.name.removesuffix(".weight").rpartition(".")[0], []).append(part)
        elif len(part.shape) == 1 and part.name.endswith(".weight"):
            kept, fused = kept + (4 // item + 1) * part.numel, fused + (4 // item - 1) * part.numel
    attention = {found.path for found in model.attention}
    widest = widest_attention = kept_in_mlps = widest_mlp = fused_in_mlps = 0.0
    mlp_weights, kept_whole, exchanged = 0, 0.0, 0.0
    for path, parts in places_in_blocks.items():
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
