"""OFT (arXiv:2306.07280): learnt rotations, in blocks along the diagonal, turn the inputs of linear layers.

Rotations keep the lengths of a weight's rows and the angles between them, and start as the identity. As in PEFT's OFTv2
(arXiv:2506.19847) they act on the inputs, so that a frozen quantized weight stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.config.section import Section, part, setting
from trainer.tuning.linear_adapters import ALL_LINEAR, LinearAdapters

if TYPE_CHECKING:
    import torch
    from peft import OFTConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.config import Tuning
    from trainer.state.checkpoint.learnt_weights import LearntWeights


class OftSettings(Section):
    """Its rotations."""

    block: int = setting(
        32,
        about=(
            "Number of a layer's inputs that are rotated together. A layer has inputs / block rotations, and each has"
            " block * (block - 1) / 2 parameters."
        ),
        example=32,
        ge=2,
        le=1024,
        unit="inputs",
    )


SETTINGS = (OftSettings,)


_SKEW = "oft_R.weight"


@dataclass(frozen=True)
class Rotation:
    """Turns the rows of a weight (outputs, inputs) by the transposes of `blocks`, (rotations, block, block) fp32."""

    shape: tuple[int, int]
    blocks: Tensor

    def apply_to(self, rows: Tensor, first: int) -> None:
        from torch import einsum

        rows = rows.view(-1, len(self.blocks), self.blocks.shape[-1])
        rows.copy_(einsum("nrk,rck->nrc", rows.float(), self.blocks))


@dataclass(frozen=True)
class Oft(LinearAdapters):
    """Rotations of the inputs of linear layers."""

    what: ClassVar[str] = "An OFT adapter"
    settings: ClassVar[Collection[str]] = ("targets", "layers", "block", "modules_to_save", "towers")
    defaults: ClassVar[Mapping[str, Any]] = {
        "targets": ALL_LINEAR,
        "layers": None,
        "block": 32,
        "modules_to_save": [],
        "towers": None,
    }
    groups_by_end: ClassVar[Mapping[str, str]] = {"oft_R": _SKEW}
    counts_activations: ClassVar[bool] = True
    adapts_4_bits: ClassVar[bool] = True

    @property
    def _block(self) -> int:
        return part(self.tuning, OftSettings).block

    def mismatches(self, architecture: Architecture) -> list[str]:
        odd = {path: linear for path, linear in self.adapted(architecture).items() if linear.inputs % self._block}
        return super().mismatches(architecture) + [
            f"tuning.block: {self._block} does not divide the {linear.inputs} inputs of {path}. Set a block that does,"
            " or name other tuning.targets."
            for path, linear in list(odd.items())[:1]
        ]

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        block = self._block
        return {
            f"{path}.{_SKEW}": (linear.inputs // block, block * (block - 1) // 2)
            for path, linear in self.adapted(architecture).items()
        }

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        from torch import nn

        from trainer.tuning.oft.layer import RotatedLinear

        for path in self.adapted(architecture):
            base = model.get_submodule(path)
            assert isinstance(base, nn.Linear)
            model.set_submodule(path, RotatedLinear(base, self._block, dtype))

    def peft_config(self, architecture: Architecture) -> OFTConfig:
        from peft import OFTConfig

        return OFTConfig(task_type="CAUSAL_LM", oft_block_size=self._block, target_modules=self.ends(architecture))

    def updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, Rotation]:
        from trainer.tuning.oft.layer import rotations

        updates: dict[str, Rotation] = {}
        for path, linear in self.adapted(architecture).items():
            blocks = rotations(weights[f"{path}.{_SKEW}"].float(), self._block)
            updates[f"{path}.weight"] = Rotation((linear.outputs, linear.inputs), blocks)
        return updates


METHODS: dict[str, Callable[[Tuning], Oft]] = {"oft": Oft}
ABOUT = {"oft": "learnt rotations of a layer's inputs"}
