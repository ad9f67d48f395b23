"""The parts of a causal language model that code of ours works on, wherever its family has them."""

from torch import nn
from transformers import PreTrainedModel

EXPERTS_WITHOUT_INTERFACE = ("Llama4TextExperts",)


def body(model: PreTrainedModel) -> nn.Module:
    """The model without its head: tokens to hidden states."""
    embedding = model.get_input_embeddings()
    return next(child for child in model.children() if any(module is embedding for module in child.modules()))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The decoder layers in order, or None where the body has no list of them."""
    lists = [module for module in body(model).modules() if isinstance(module, nn.ModuleList)]
    count = model.config.num_hidden_layers
    return next((found for found in lists if len(found) == count), lists[0] if lists else None)


def is_experts(module: nn.Module) -> bool:
    """Whether it is the experts' module of a mixture, whose 3-D parameters trainer/model/experts.py multiplies with: transformers'
    interface of experts gives their class this attribute, and those of `EXPERTS_WITHOUT_INTERFACE` are older."""
    return "has_gate" in vars(module) or type(module).__name__ in EXPERTS_WITHOUT_INTERFACE
