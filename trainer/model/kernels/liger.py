"""Liger's kernels (arXiv:2410.10989) for the norms, rotary embeddings and gated MLPs of a base, on GPUs.

Liger itself knows which of them a family of models takes. Its losses and its experts are left out:
trainer/model/head.py has a loss in chunks, and trainer/model/experts.py computes experts over 4-bit stacks.
"""

import copy
import inspect
import logging
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.errors import ConfigError, first_line
from trainer.model.kernels.launch import can_launch
from trainer.model.parts import is_experts

_DISTRIBUTION, _INSTALL = "liger-kernel", "pip install 'capstan-llm[gpu]'"
# These parts of Liger are not used: its layer norms and its activation for Nemotron would replace those of all models,
# whatever their family.
_LEFT_OUT = dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy", "layer_norm", "relu_squared"), False)


@dataclass
class Kernels:
    """The kernels that `model.kernels` means for a base on `device`, known once applied. `name` is liger or none.
    `why` is for the log: the parts that Liger computes, or the reason why there are none."""

    setting: str
    device: torch.device
    name: str = "none"
    why: str = "set by model.kernels"

    def apply(self, model: PreTrainedModel) -> None:
        """Give `model` the kernels that compute what its own modules do. It must not have a forward pass of ours yet.

        Raises:
            ConfigError: they are set, but cannot run here or cannot compute this base.
        """
        if self.setting == "none":
            return
        family = model.config.model_type
        reason = missing(self.device, family)
        parts = fuse(model, self.device) if reason is None else []
        if reason is None and not parts:
            reason = f"{_DISTRIBUTION} computes nothing as these {family} models do"
        if reason is None:
            self.name, self.why = "liger", ", ".join(parts)
        elif self.setting == "auto":
            self.why = reason
        else:
            raise ConfigError(f"model.kernels: {self.setting!r} cannot run here: {reason}. Use auto or none.")


def missing(device: torch.device, family: str) -> str | None:
    """Return why Liger's kernels cannot run on the device, or for models of transformers' `family`; None if they
    can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    try:
        version = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return f"the {_DISTRIBUTION} package is not installed ({_INSTALL})"
    try:
        from liger_kernel.transformers import monkey_patch  # pyright: ignore[reportMissingImports]

        families = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception as error:  # a package whose Triton does not fit it raises anything
        return f"{_DISTRIBUTION} {version} cannot be imported ({first_line(error)})"
    if not can_launch(device.type):
        return "Triton needs a C compiler and Python's headers on this machine"
    return None if family in families else f"{_DISTRIBUTION} {version} has no kernels for {family} models"


def fuse(model: PreTrainedModel, device: torch.device) -> list[str]:
    """Have Liger change `model`, and return the names of the classes and functions that its kernels replace.

    A family's rotary embedding is a function of its source file. From now on that function is Liger's in this process.
    Raises `ConfigError` if Liger raises anything.
    """
    from liger_kernel.backends import set_impl  # pyright: ignore[reportMissingImports]
    from liger_kernel.transformers import monkey_patch  # pyright: ignore[reportMissingImports]

    # If flash-attn-4 is installed, Liger prefers kernels in other languages to Triton's. tests/liger_kernels.py cannot
    # check those.
    set_impl("nvidia-triton")
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # It warns of each such language that is not installed.
    code = vars(sys.modules[type(model).__module__])
    plain = dict(code)
    try:
        # The public way to the same, AutoLigerKernelForCausalLM, only loads whole models.
        monkey_patch._apply_liger_kernel_to_instance(model, **_LEFT_OUT)
    except Exception as error:  # a release of transformers may have other modules than Liger knows
        family = model.config.model_type
        raise ConfigError(f"model.kernels: {_DISTRIBUTION} fails on {family} models ({error}). Set none.") from error
    finally:  # Liger also changes the classes of later models, which may be on a CPU
        code.update({name: value for name, value in plain.items() if inspect.isclass(value)})
    names = {name for name in plain if str(getattr(code[name], "__module__", "")).startswith("liger_kernel.")}
    agreed = dict[Any, bool]()
    for module in (module for module in model.modules() if "forward" in vars(module)):
        kind = type(module), module.forward.__func__
        if kind not in agreed:
            agreed[kind] = not is_experts(module) and _agrees(module, device)
        if agreed[kind]:
            names.add(type(module).__name__)
        else:
            del module.forward
    return sorted(names)


@torch.no_grad()
def _agrees(module: Any, device: torch.device) -> bool:
    """Whether a module's forward pass by Liger gives the same as that of its class. Liger takes for granted that a
    family's MLPs have its usual activation. The check uses made-up weights, and linear layers return their inputs."""
    made = copy.copy(module)
    made._parameters = {
        name: torch.linspace(0.5, 1.5, weight.numel(), device=device).view(weight.shape)
        for name, weight in module.named_parameters(recurse=False)
    }
    made._modules = {
        name: nn.Identity() if isinstance(child, nn.Linear) else child for name, child in module.named_children()
    }
    width = next((weight.numel() for weight in made._parameters.values()), 64)
    x = torch.linspace(-4, 4, width, device=device)[None]
    return torch.allclose(module.forward.__func__(made, x), type(module).forward(made, x), rtol=1e-4, atol=1e-4)
