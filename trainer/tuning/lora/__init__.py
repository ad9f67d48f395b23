"""Low-rank adapters: W + scaling * B @ A with a frozen W (LoRA, arXiv:2106.09685), by PEFT.

`lora` scales by alpha / rank, `rslora` by alpha / sqrt(rank) (arXiv:2312.03732). A is (rank, inputs), B (outputs,
rank).

`dora` (arXiv:2402.09353) also learns the lengths of the weight's rows: the weight becomes magnitude * (W + scaling * B
@ A) / |W + scaling * B @ A|, row by row, with scaling = alpha / rank and the magnitude (outputs,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from trainer.config.section import Section, part, setting
from trainer.tuning.linear_adapters import LowRank, LowRankUpdate, taken_for_experts
from trainer.tuning.method import flagged

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.config import Tuning
    from trainer.state.checkpoint.learnt_weights import LearntWeights


class LoraSettings(Section):
    """The start of the adapters."""

    init: Literal["kaiming", "gaussian", "orthogonal"] = setting(
        "kaiming",
        about=(
            "Initial values of the two matrices A and B, as in PEFT's init_lora_weights. kaiming: A is uniform, B is"
            " zero. gaussian: A is normal with standard deviation 1 / rank, B is zero. orthogonal: both are nonzero"
            " and orthogonal to each other, so that their product is zero; the rank must be even."
        ),
        example="orthogonal",
    )

    through: Literal["stored"] | None = setting(
        None,
        about=(
            "stored, with a base in 4 or 8 bits (quant.type: stored): every pass merges the adapter into the stored"
            " codes and computes with the result, exactly as `capstan export --format merged as=stored` writes it. So"
            " the served model equals the trained one. Default: the adapter's output is added to the frozen layer's"
            " output."
        ),
        example="stored",
    )

    @model_validator(mode="after")
    def _start_once(self) -> LoraSettings:
        if self.init != "kaiming" and getattr(self, "start", None):
            raise ValueError(
                f"tuning.init: {self.init} has no effect with tuning.start, from which learning begins. Remove one of"
                " them."
            )
        rank: int = getattr(self, "rank", 0)
        if self.init == "orthogonal" and rank % 2:
            raise ValueError(f"tuning.init: orthogonal needs an even rank, and tuning.rank is {rank}. Set another one.")
        return self


SETTINGS = (LoraSettings,)


# PEFT's names of the two matrices in the model: `<linear layer>.lora_A.<adapter's name>.weight`.
_ADAPTER = "default"
# DoRA's names in trainer/tuning/lora/layer.py, which are PEFT's; PEFT saves the matrices as those of linear layers.
_DOWN, _UP, _MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
_SAVED_AS = {_DOWN: f"{_DOWN}.weight", _UP: f"{_UP}.weight", _MAGNITUDE: _MAGNITUDE}


@dataclass(frozen=True)
class Lora(LowRank):
    """Adapters on linear layers; `rank_stabilized` is rsLoRA's scaling."""

    rank_stabilized: bool

    what: ClassVar[str] = "A LoRA adapter"
    settings: ClassVar[Collection[str]] = (*LowRank.settings, "experts", "experts_rank", "init", "through")
    defaults: ClassVar[Mapping[str, Any]] = {
        **LowRank.defaults,
        "experts": False,
        "experts_rank": None,
        "init": "kaiming",
        "through": None,
    }
    adapts_towers: ClassVar[bool] = True
    groups_by_end: ClassVar[Mapping[str, str]] = {kind: f"{kind}.{_ADAPTER}.weight" for kind in ("lora_A", "lora_B")}
    counts_activations: ClassVar[bool] = True

    @property
    def through(self) -> bool:
        return part(self.tuning, LoraSettings).through is not None

    def scaling_of(self, rank: int) -> float:
        return self.tuning.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for path, linear in self.adapted(architecture).items():
            shapes[f"{path}.lora_A.{_ADAPTER}.weight"] = (self.tuning.rank, linear.inputs)
            shapes[f"{path}.lora_B.{_ADAPTER}.weight"] = (linear.outputs, self.tuning.rank)
        return shapes

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        import torch
        from peft import inject_adapter_in_model

        from trainer.tuning.lora.layer import LoraLinear

        config = self.adapting(self.ends(architecture))
        config._register_custom_module({torch.nn.Linear: LoraLinear})  # PEFT's way to have layers of one's own
        torch.manual_seed(seed)
        # PEFT reads the model's config to find experts. A container has none, so PEFT adapts exactly the given names;
        # see `LowRank.peft_config`.
        whole = torch.nn.Sequential(model)
        inject_adapter_in_model(config, whole, adapter_name=_ADAPTER)
        self._compute_through(model, architecture)
        for paths in architecture.read_together if not self.through else ():
            layers = [layer for path in paths if isinstance(layer := model.get_submodule(path), LoraLinear)]
            for first in layers[:1]:
                first.beside = tuple(layers[1:])
        self._begin(model, architecture, seed)
        learning = self.shapes(architecture).keys()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learning)
            if name in learning:
                parameter.data = parameter.data.to(dtype)

    def _compute_through(self, model: PreTrainedModel, architecture: Architecture) -> None:
        """Have the layers whose weights are in codes compute by the codes of an export, if the run is to."""
        from trainer.model.held.layers import held_by

        for path in self.adapted(architecture) if self.through else ():
            layer: Any = model.get_submodule(path)
            if held_by(layer.base_layer).moves:
                layer.through = f"{path}.weight"

    def _begin(self, model: PreTrainedModel, architecture: Architecture, seed: int) -> None:
        """Set a start other than PEFT's default. PEFT's own code would use the base's type, even if that is 4-bit."""
        from torch import Generator

        from trainer.tuning.lora.layer import STARTS

        start = STARTS.get(part(self.tuning, LoraSettings).init)
        if start is None:
            return
        drawn = Generator().manual_seed(seed)
        for path, linear in self.adapted(architecture).items():
            for kind, values in zip("AB", start(self.tuning.rank, linear.inputs, linear.outputs, drawn), strict=True):
                matrix = model.get_parameter(f"{path}.lora_{kind}.{_ADAPTER}.weight")
                matrix.data = values.to(matrix.device)

    def begun(self, inputs: int, outputs: int, drawn: Generator) -> tuple[Tensor, Tensor]:
        import torch

        from trainer.tuning.lora.layer import STARTS

        start = STARTS.get(part(self.tuning, LoraSettings).init)
        if start is not None:
            return start(self.tuning.rank, inputs, outputs, drawn)
        down = torch.nn.init.kaiming_uniform_(torch.empty(self.tuning.rank, inputs), a=math.sqrt(5), generator=drawn)
        return down, torch.zeros(outputs, self.tuning.rank)

    @property
    def options(self) -> dict[str, Any]:
        return {"use_rslora": self.rank_stabilized}

    @contextmanager
    def switched_off(self, model: PreTrainedModel) -> Iterator[None]:
        from peft.tuners.lora import LoraLayer

        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        # PEFT's private flag: its `enable_adapters` would rewrite requires_grad too, which ZeRO-3 has read already.
        with super().switched_off(model), flagged(layers, "_disable_adapters", True):
            yield

    def saved_name(self, name: str) -> str:
        """PEFT saves without the adapter's own name."""
        return name.replace(f".{_ADAPTER}.", ".")

    def updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, LowRankUpdate]:
        updates: dict[str, LowRankUpdate] = {}
        for path in self.adapted(architecture):
            up, down = (weights[f"{path}.lora_{kind}.{_ADAPTER}.weight"] for kind in "BA")
            updates[f"{path}.weight"] = LowRankUpdate(up, down, self.scaling)
        return updates


@dataclass(frozen=True)
class DoraUpdate:
    """Replaces W by magnitude * (W + low_rank) / |W + low_rank|; magnitude (outputs,), fp32.

    The norm is that of the weight into which the update is merged, as in PEFT."""

    low_rank: LowRankUpdate
    magnitude: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.low_rank.shape

    def apply_to(self, rows: Tensor, first: int) -> None:
        rows = rows.view(-1, self.shape[1])
        turned = self.low_rank.product(first, len(rows)).add_(rows)
        magnitude = self.magnitude[first : first + len(rows)]
        rows.copy_(turned.mul_((magnitude / turned.norm(dim=1)).unsqueeze(1)))


@dataclass(frozen=True)
class Dora(LowRank):
    """Adapters on linear layers, with a magnitude for each of their outputs."""

    what: ClassVar[str] = "A DoRA adapter"
    groups_by_end: ClassVar[Mapping[str, str]] = {kind: kind for kind in (_DOWN, _UP, _MAGNITUDE)}

    def mismatches(self, architecture: Architecture) -> list[str]:
        found = super().mismatches(architecture)
        if taken := taken_for_experts(architecture, self.ends(architecture)):
            found.append(
                f"tuning.method: dora cannot be exported for {', '.join(taken)} of this base, which PEFT takes for its"
                " experts. Leave them out of tuning.targets, or set tuning.method: lora."
            )
        return found

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        rank, shapes = self.tuning.rank, dict[str, tuple[int, ...]]()
        for path, linear in self.adapted(architecture).items():
            shapes[f"{path}.{_DOWN}"] = (rank, linear.inputs)
            shapes[f"{path}.{_UP}"] = (linear.outputs, rank)
            shapes[f"{path}.{_MAGNITUDE}"] = (linear.outputs,)
        return shapes

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        """The magnitudes start as the row norms of the base.

        Each layer is gathered once, by itself, so every rank gets the same values.
        """
        import torch
        from torch import nn

        from trainer.state.zero.engine import gathered
        from trainer.tuning.lora.layer import DoraLinear

        torch.manual_seed(seed)
        for path in self.adapted(architecture):
            base = model.get_submodule(path)
            assert isinstance(base, nn.Linear)
            with gathered(base):
                layer = DoraLinear(base, self.tuning.rank, self.scaling, self.tuning.dropout, dtype)
            model.set_submodule(path, layer)

    @property
    def options(self) -> dict[str, Any]:
        return {"use_dora": True}

    def saved_name(self, name: str) -> str:
        path, _, kind = name.rpartition(".")
        return f"{path}.{_SAVED_AS[kind]}"

    def updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, DoraUpdate]:
        updates: dict[str, DoraUpdate] = {}
        for path in self.adapted(architecture):
            up, down, magnitude = (weights[f"{path}.{kind}"].float() for kind in (_UP, _DOWN, _MAGNITUDE))
            updates[f"{path}.weight"] = DoraUpdate(LowRankUpdate(up, down, self.scaling), magnitude)
        return updates


METHODS: dict[str, Callable[[Tuning], LowRank]] = {
    "dora": Dora,
    "lora": partial(Lora, rank_stabilized=False),
    "rslora": partial(Lora, rank_stabilized=True),
}
ABOUT = {
    "dora": "as lora, with a learnt length for each row of a weight",
    "lora": "low-rank adapters, scaled by alpha / rank",
    "rslora": "as lora, scaled by alpha / sqrt(rank)",
}
