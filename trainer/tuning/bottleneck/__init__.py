"""Bottleneck adapters: small MLPs that learn, with a residual, after the blocks of each decoder layer of a frozen base.

`tuning.placement: houlsby` (arXiv:1902.00751) has one after attention and one after the MLP, `pfeiffer`
(arXiv:2005.00247) only the latter. Each adapter changes the output of its block before that is added to the hidden
states. A mixture of experts is one block. Where the base normalises the output of a block, as Gemma does, the adapter
comes before that norm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainer.config.section import Section, part, setting
from trainer.tuning.method import ExportedFiles, MethodOfSettings, flagged

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.config import Model, Optim, Tuning


class BottleneckSettings(Section):
    """Their sizes and places."""

    reduction: int = setting(
        16,
        about="A bottleneck layer has the width hidden size / reduction, rounded down.",
        example=16,
        ge=1,
        le=65536,
    )
    activation: Literal["relu", "gelu", "silu", "tanh"] = setting(
        "relu", about="The function between the two matrices of a bottleneck layer.", example="gelu"
    )
    placement: Literal["houlsby", "pfeiffer"] = setting(
        "houlsby",
        about=("Place of the bottleneck layers. houlsby: after attention and after the MLP. pfeiffer: after the MLP."),
        example="pfeiffer",
    )


SETTINGS = (BottleneckSettings,)


# The names that trainer/tuning/bottleneck/load_in_transformers.py reads. Nothing loads without the settings.
_WEIGHTS, _LOADER, _SETTINGS = "bottleneck.safetensors", "load_bottleneck.py", "bottleneck.json"


@dataclass(frozen=True)
class BottleneckAdapters(MethodOfSettings):
    """Adapters whose width is the hidden size divided by `tuning.reduction`."""

    settings: ClassVar[Collection[str]] = ("reduction", "activation", "placement")
    unmergeable: ClassVar[str | None] = "a bottleneck adapter is not linear, so no weight of the base can hold it"
    file_names: ClassVar[Collection[str]] = (_WEIGHTS, _LOADER)
    counts_activations: ClassVar[bool] = True
    adapts_4_bits: ClassVar[bool] = True

    def mismatches(self, architecture: Architecture) -> list[str]:
        found = list[str]()
        if any(len(paths) != 2 for paths in architecture.blocks().values()):
            found.append(
                f"tuning.method: {self.tuning.method} needs decoder layers of two blocks, such as attention and an MLP,"
                " which this base has not. Choose lora."
            )
        if not self._width(architecture):
            found.append(
                f"tuning.reduction: {self._given.reduction} leaves nothing of the base's hidden size of"
                f" {architecture.width}. Lower it."
            )
        return found

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        hidden, width = architecture.width, self._width(architecture)
        parts = {
            "down.weight": (width, hidden),
            "down.bias": (width,),
            "up.weight": (hidden, width),
            "up.bias": (hidden,),
        }
        return {f"{path}.adapter.{part}": parts[part] for path in self._places(architecture) for part in parts}

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        import torch

        from trainer.tuning.bottleneck.layer import Bottleneck, insert

        torch.manual_seed(seed)
        for path in self._places(architecture):
            block = model.get_submodule(path)
            device = next(block.parameters()).device
            width = self._width(architecture)
            insert(block, Bottleneck(architecture.width, width, self._given.activation, device, dtype))

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"name": "adapters", "lr_ratio": 1.0, "params": learning}]

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """Three files: the weights by their names in the model, the settings, and the code that loads both."""
        from safetensors.torch import save

        from trainer.tuning.bottleneck import load_in_transformers

        settings = {
            "base_model": model.base,
            "revision": model.revision,
            "reduction": self._given.reduction,
            "activation": self._given.activation,
            "placement": self._given.placement,
            "blocks": list(dict.fromkeys(name.partition(".adapter.")[0] for name in weights)),
        }
        files = {
            _WEIGHTS: save(weights, metadata={"format": "pt"}),
            _LOADER: Path(load_in_transformers.__file__).read_bytes(),
            _SETTINGS: json.dumps(settings, indent=2).encode(),
        }
        return ExportedFiles("transformers", f"A bottleneck adapter, which {_LOADER} puts on its base,", files)

    def load_exported(self, model: PreTrainedModel, folder: Path) -> AbstractContextManager[None]:
        from trainer.tuning.bottleneck.load_in_transformers import load_bottleneck

        return flagged(load_bottleneck(model, folder), "active", False)

    @property
    def _given(self) -> BottleneckSettings:
        return part(self.tuning, BottleneckSettings)

    def _width(self, architecture: Architecture) -> int:
        return architecture.width // self._given.reduction

    def _places(self, architecture: Architecture) -> list[str]:
        """Paths of the blocks that get an adapter."""
        blocks = architecture.blocks().values()
        return [path for layer in blocks for path in (layer if self._given.placement == "houlsby" else layer[-1:])]


METHODS: dict[str, Callable[[Tuning], BottleneckAdapters]] = {"bottleneck": BottleneckAdapters}
ABOUT = {"bottleneck": "narrow layers inserted after attention and MLP"}
