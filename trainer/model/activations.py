"""The activations that decoder layers need in their backward pass: kept from the forward pass, or computed again."""

from typing import Any

import torch
from transformers import PreTrainedModel

from trainer.config.training import Train
from trainer.model.documents import recomputed
from trainer.model.offload import Offload
from trainer.model.parts import is_layer
from trainer.model.tiled import mlps, tile
from trainer.processes.accelerator import kind


def arrange_activations(model: PreTrainedModel, settings: Train) -> None:
    """Make layers of `model` compute their activations again, keep their inputs on the host and tile their MLPs, as
    `settings` say.

    The last layers are the cheapest to keep: their backward passes come first, and when the others are computed again,
    theirs are gone.
    """
    layers: list[Any] = [module for module in model.modules() if is_layer(module)]
    again = len(layers) - settings.kept_layers(len(layers))
    if again:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": recomputed})
        model.disable_input_require_grads()  # only reentrant checkpointing needs a gradient of the embedding's output
    here = kind()
    offload = (
        Offload(torch.device(here), again) if here and settings.activation_offload else None
    )  # a CPU's are on the host
    for place, layer in enumerate(layers):
        layer.gradient_checkpointing = place < again  # transformers' flag
        if offload is not None:
            layer._gradient_checkpointing_func = offload.checkpoint
        if longest := settings.longest_mlp(recomputed=place < again):
            for mlp in mlps(layer):
                tile(mlp, longest)
