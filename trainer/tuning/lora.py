"""Low-rank adapters: W + scaling * B @ A with a frozen W (LoRA, arXiv:2106.09685), by PEFT.

`lora` scales by alpha / rank, `rslora` by alpha / sqrt(rank) (arXiv:2312.03732). A is (rank, inputs), B (outputs, rank).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.base.architecture import Architecture, Linear
from trainer.config import Model, Optim, Tuning
from trainer.scratch import scratch_folder
from trainer.tuning.method import ExportedFiles

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import Tensor
    from transformers import PreTrainedModel

# PEFT's names of the two matrices in the model: `<linear layer>.lora_A.<adapter's name>.weight`.
_ADAPTER = "default"
# The two files of PEFT's `save_pretrained`; PEFT loads nothing without the settings.
_WEIGHTS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LowRankUpdate:
    """scaling * up @ down; up (outputs, rank), down (rank, inputs), fp32."""

    up: Tensor
    down: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def add_to(self, rows: Tensor, first: int) -> None:
        rows = rows.view(-1, self.shape[1])
        change = self.up[first : first + len(rows)] @ self.down
        rows.copy_(change.mul_(self.scaling).add_(rows))


@dataclass(frozen=True)
class Lora:
    """Adapters on linear layers; `rank_stabilized` is rsLoRA's scaling."""

    tuning: Tuning
    rank_stabilized: bool

    settings: ClassVar[Collection[str]] = ("rank", "alpha", "dropout", "targets")
    defaults: ClassVar[Mapping[str, Any]] = {"dropout": 0.0, "targets": "all-linear"}
    trains_base: ClassVar[bool] = False
    unmergeable: ClassVar[str | None] = None
    file_names: ClassVar[Collection[str]] = (_WEIGHTS, _SETTINGS)

    @property
    def identity(self) -> dict[str, Any]:
        given = self.tuning.model_dump(mode="json", include={"method", *self.settings})
        return {key: value for key, value in given.items() if key not in self.defaults or value != self.defaults[key]}

    @property
    def scaling(self) -> float:
        """The factor on B @ A."""
        rank = self.tuning.rank
        return self.tuning.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def mismatches(self, architecture: Architecture) -> list[str]:
        targets = [] if self.tuning.targets == "all-linear" else self.tuning.targets
        names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in architecture.linear_layers()))
        return [
            f"tuning.targets: {target!r} is no linear layer that can be adapted. The base has {names}."
            for target in targets
            if not _matching(architecture, [target])
        ]

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for path, linear in _matching(architecture, self.tuning.targets).items():
            shapes[f"{path}.lora_A.{_ADAPTER}.weight"] = (self.tuning.rank, linear.inputs)
            shapes[f"{path}.lora_B.{_ADAPTER}.weight"] = (linear.outputs, self.tuning.rank)
        return shapes

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        import torch
        from peft import inject_adapter_in_model

        # PEFT's own all-linear also takes routers and experts, where there are any.
        targets = self.tuning.targets
        names = architecture.linear_names if targets == "all-linear" else targets
        torch.manual_seed(seed)
        inject_adapter_in_model(self.peft_config(names), model, adapter_name=_ADAPTER)
        for name, parameter in model.named_parameters():
            learns = ".lora_" in name
            parameter.requires_grad_(learns)
            if learns:
                parameter.data = parameter.data.to(dtype)

    def peft_config(self, targets: str | Iterable[str]) -> LoraConfig:
        """PEFT's description of the adapters, `targets` as PEFT matches them to the end of a module's name."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.tuning.rank,
            lora_alpha=self.tuning.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
            lora_dropout=self.tuning.dropout,
            use_rslora=self.rank_stabilized,
            target_modules=targets if isinstance(targets, str) else sorted(targets),
        )

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        """The two matrices apart: LoRA+ (arXiv:2402.12354) lets B learn faster than A."""
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        ratios = {"lora_A": 1.0, "lora_B": optim.lora_plus_ratio}
        return [
            {"name": kind, "lr_ratio": ratio, "params": [matrix for name, matrix in trainable if f".{kind}." in name]}
            for kind, ratio in ratios.items()
        ]

    @contextmanager
    def switched_off(self, model: PreTrainedModel) -> Iterator[None]:
        from peft.tuners.lora import LoraLayer

        layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        # PEFT's private flag: its `enable_adapters` would rewrite requires_grad too, which ZeRO-3 has read already.
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """PEFT's folder."""
        from safetensors.torch import save

        adapter = self.peft_config({name.split(".lora_")[0].rpartition(".")[2] for name in weights})
        adapter.inference_mode = True
        adapter.base_model_name_or_path = model.base  # a Hub id stays one, not this machine's cache
        adapter.revision = model.revision
        with scratch_folder("export") as folder:
            adapter.save_pretrained(folder)
            settings = json.loads(Path(folder, _SETTINGS).read_bytes())
        settings["target_modules"].sort()  # PEFT writes a set, whose order changes from one process to the next
        # PEFT saves under the wrapped model's names and without the adapter's own name.
        named = {f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": matrix for name, matrix in weights.items()}
        files = {
            _WEIGHTS: save(named, metadata={"format": "pt"}),
            _SETTINGS: json.dumps(settings, indent=2, sort_keys=True).encode(),
        }
        return ExportedFiles("peft", "A LoRA adapter", files)

    def updates(self, weights: dict[str, Tensor]) -> dict[str, LowRankUpdate]:
        updates: dict[str, LowRankUpdate] = {}
        for name in weights:
            path, found, rest = name.partition(".lora_A.")
            if found:
                up, down = weights[f"{path}.lora_B.{rest}"].float(), weights[name].float()
                updates[f"{path}.weight"] = LowRankUpdate(up, down, self.scaling)
        assert 2 * len(updates) == len(weights), "something else than LoRA's matrices was trained"
        return updates


def _matching(architecture: Architecture, targets: str | Iterable[str]) -> dict[str, Linear]:
    """Path in the model -> linear layer that gets an adapter; PEFT matches a target to the end of a path."""
    linears = architecture.linear_layers()
    if targets == "all-linear":
        return linears
    ends = tuple(f".{target}" for target in ([targets] if isinstance(targets, str) else targets))
    return {path: linear for path, linear in linears.items() if f".{path}".endswith(ends)}


METHODS: dict[str, Callable[[Tuning], Lora]] = {
    "lora": partial(Lora, rank_stabilized=False),
    "rslora": partial(Lora, rank_stabilized=True),
}
