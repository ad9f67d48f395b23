"""The parts of a causal language model on which our code works, wherever its family has them."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

EXPERTS_WITHOUT_INTERFACE = ("Llama4TextExperts",)


def body(model: PreTrainedModel) -> nn.Module:
    """The model without its head: tokens to hidden states. This is transformers' decoder, or the part with the
    embedding if that is outside of the decoder.
    """
    embedding, decoder = model.get_input_embeddings(), model.get_decoder()
    if decoder is not model and any(module is embedding for module in decoder.modules()):
        return decoder
    return next(child for child in model.children() if any(module is embedding for module in child.modules()))


def in_order(model: PreTrainedModel) -> list[nn.Module]:
    """The parts of the body that are computed one after another. Each decoder layer is one."""
    return [
        part for child in body(model).children() for part in (child if isinstance(child, nn.ModuleList) else [child])
    ]


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Each further name of a tied weight -> its first name."""
    first = dict[int, str]()
    names = {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: original for name, original in names.items() if name != original}


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The decoder layers in order, or None if the body has no list of them."""
    lists = [module for module in body(model).modules() if isinstance(module, nn.ModuleList)]
    count = model.config.num_hidden_layers
    return next((found for found in lists if len(found) == count), lists[0] if lists else None)


def is_layer(module: nn.Module) -> bool:
    """Whether it is a decoder layer, or a layer of another kind whose activations transformers can recompute."""
    return isinstance(module, GradientCheckpointingLayer)


def recomputed_share(model: nn.Module) -> float:
    """The share of the layers whose forward pass is repeated in the backward pass."""
    layers: list[Any] = [module for module in model.modules() if is_layer(module)]
    return sum(layer.gradient_checkpointing for layer in layers) / max(1, len(layers))


def is_computed_at_once(module: nn.Module) -> bool:
    """Whether its forward pass reads the parameters of the modules in it without calling these, as that of
    trainer/tuning/lora/layer.py does.
    """
    return getattr(module, "computed_at_once", False) is True


def is_experts(module: nn.Module) -> bool:
    """Whether it is the experts' module of a mixture, whose 3-D parameters trainer/model/experts.py multiplies with:
    transformers' interface of experts gives their class this attribute, and those of `EXPERTS_WITHOUT_INTERFACE` are
    older."""
    return "has_gate" in vars(module) or type(module).__name__ in EXPERTS_WITHOUT_INTERFACE
