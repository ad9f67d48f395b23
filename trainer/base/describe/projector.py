"""Finds the projector of a class that sees: the weights that turn what its encoder makes into states of the decoder.

transformers has no name for it, and each family another place. What a projector makes is as wide as the decoder, so the
class is built a second time on `meta` around a wider decoder:

    visual.blocks.0.mlp.linear_fc1     (64, 32)   (64, 32)      the encoder
    visual.merger.linear_fc1           (128, 128) (128, 128)    in a module with what follows: the projector, too
    visual.merger.linear_fc2           (64, 128)  (128, 128)    another shape: the projector
"""

import copy

from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.base.describe.empty_model import whole_model
from trainer.base.describe.language_model import beside_decoder, inner_of
from trainer.base.describe.trial.self_test import parts_of

_AS_WIDE = (
    *("out_hidden_size", "text_hidden_size", "projection_dim", "output_proj_dims", "proj_dim", "output_dim"),
    *("projector_output_dim", "mm_embed_dim"),
)
"""Settings that encoders have for the width of what they hand to the decoder."""


def projector_of(config: PretrainedConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Path of each module of the projector of the class that `config` describes -> its parameters' names and shapes.

    Empty if it cannot be told. No module is a list, which PEFT cannot have in `modules_to_save`. The class may raise
    any error.
    """
    whole, other = whole_model(config), whole_model(_wider(config)).state_dict(keep_vars=True)
    decoder = inner_of(whole)
    # A layer of the encoder may have an inner width that is equal to the decoder's.
    layers = [path for path, module in whole.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    apart = [*layers, next(path for path, module in whole.named_modules() if module is decoder)]
    found = dict.fromkeys(
        _widest(name.rpartition(".")[0], apart)
        for name, tensor in beside_decoder(whole).items()
        if other[name].shape != tensor.shape and not any(name.startswith(f"{path}.") for path in layers)
    )
    paths = [one for path in found if path for one in _without_lists(path, whole.get_submodule(path))]
    named = {path: dict(whole.get_submodule(path).named_parameters()) for path in paths}
    return {path: {name: tuple(value.shape) for name, value in own.items()} for path, own in named.items()}


def _wider(config: PretrainedConfig) -> PretrainedConfig:
    """The settings of the same class around a decoder that is twice as wide."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    width = text.hidden_size
    for part in parts_of(made):
        settings = vars(part)
        # Beside the width of its own layers (`embed_dim`), Qwen2-VL's encoder calls the decoder's its `hidden_size`.
        own = part is text or "embed_dim" in settings or any(value is text for value in settings.values())
        for key, value in list(settings.items()):
            if value == width and (key in _AS_WIDE or (own and key == "hidden_size")):
                setattr(part, key, 2 * width)
    return made


def _widest(path: str, apart: list[str]) -> str:
    """The path of the module at `path`, or of one around it, with none of those `apart` inside; empty if there is none.

    A class may have a single parameter of its own beside its decoder (LLaVA-NeXT's line break), which is no module.
    """
    found = ""
    while path and not any(f"{one}.".startswith(f"{path}.") for one in apart):
        found, path = path, path.rpartition(".")[0]
    return found


def _without_lists(path: str, module: nn.Module) -> list[str]:
    """The path, or those of the modules in a list."""
    if not isinstance(module, nn.ModuleList):
        return [path]
    return [one for name, inner in module.named_children() for one in _without_lists(f"{path}.{name}", inner)]
