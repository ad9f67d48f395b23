"""The base classes of methods that adapt single linear layers: which layers they adapt, and PEFT's files."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.config.registry import without_defaults
from trainer.config.section import expression, is_pattern
from trainer.store.scratch import scratch_folder
from trainer.tuning.method import ExportedFiles, MethodOfSettings, exact_product, methods

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig
    from torch import Generator, Tensor

    from trainer.base.architecture import Architecture, Linear
    from trainer.config import Model, Tuning

# The names in PEFT's folder of an adapter. They are written here because not every reader of such a folder needs PEFT.
PREFIX = "base_model.model."  # of the weights' names: the wrapped model's
# The two files of PEFT's `save_pretrained`; PEFT loads nothing without the settings.
PEFT_WEIGHTS, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
LABELS = "id2label.json"
"""Beside them where a head has learnt: the names of its outputs by their numbers, as transformers wants them."""
PEFT_FILES = (PEFT_WEIGHTS, LABELS)  # of a half export: the settings are written last
ALL_LINEAR = "all-linear"

Targets = str | list[str]
"""`all-linear`, or names of layers: each the end of a path, or with a wildcard the pattern of one."""


@dataclass(frozen=True)
class LinearAdapters(MethodOfSettings):
    """A method that adds something to linear layers of a frozen base.

    `auto` is the meaning of `tuning.targets: auto` for the method. `what` names its exports at the beginning of a
    sentence.
    """

    auto: ClassVar[Targets] = ALL_LINEAR
    what: ClassVar[str]
    file_names: ClassVar[Collection[str]] = PEFT_FILES

    @property
    def targets(self) -> Targets:
        return self.auto if self.tuning.targets == "auto" else self.tuning.targets

    @property
    def identity(self) -> dict[str, Any]:
        """`targets` in their resolved form, whatever the configuration calls them."""
        return without_defaults({**super().identity, "targets": self.targets}, self.defaults)

    def mismatches(self, architecture: Architecture) -> list[str]:
        layers, found = self.tuning.layers, unknown_targets(architecture, self.targets)
        if layers and layers[1] > architecture.layers:
            found.append(
                f"tuning.layers: {list(layers)} ends behind the base's last layer. It has {architecture.layers}."
            )
        elif not found and not self.adapted(architecture):
            found.append(f"tuning.layers: {list(layers or ())} have none of the layers of tuning.targets. Name others.")
        return found

    def adapted(self, architecture: Architecture) -> dict[str, Linear]:
        """Path in the model -> linear layer that gets an adapter."""
        linears, layers = matching(architecture, self.targets), self.tuning.layers
        if layers is None:
            return linears
        within = {part.name for layer in range(*layers) for part in architecture.in_layer(layer)}
        return {path: linear for path, linear in linears.items() if f"{path}.weight" in within}

    def ends(self, architecture: Architecture) -> list[str]:
        """Names by which PEFT finds the adapted layers and no others."""
        return shortest_ends(architecture, self.adapted(architecture))

    def peft_config(self, architecture: Architecture) -> PeftConfig:
        """PEFT's description of the adapters of a base."""
        raise NotImplementedError

    def saved_name(self, name: str) -> str:
        """The name of a trained parameter in PEFT's files, without the prefix of the wrapped model."""
        return name

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """PEFT's folder."""
        from trainer.base.find.locate import describe_base

        named = {self.saved_name(name): weight for name, weight in weights.items()}
        config = self.peft_config(describe_base(model).architecture)
        return ExportedFiles("peft", self.what, peft_files(config, named, model))


@dataclass(frozen=True)
class LowRank(LinearAdapters):
    """A method that has LoRA's two matrices. `options` are the settings of PEFT's `LoraConfig` in which they differ."""

    settings: ClassVar[Collection[str]] = (
        "rank",
        "alpha",
        "dropout",
        "targets",
        "layers",
        "modules_to_save",
        "towers",
        "optim.lora_plus_ratio",
        "model.add_tokens",
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "dropout": 0.0,
        "targets": ALL_LINEAR,
        "layers": None,
        "modules_to_save": [],
        "towers": None,
    }
    adapts_4_bits: ClassVar[bool] = True
    adapts_towers: ClassVar[bool] = False
    """Whether layers of the tower can have its adapters, which `begun` starts."""

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @property
    def scaling(self) -> float:
        """The factor on B @ A."""
        return self.scaling_of(self.tuning.rank)

    def scaling_of(self, rank: int) -> float:
        """The factor for adapters of another rank."""
        return self.tuning.alpha / rank

    def begun(self, inputs: int, outputs: int, drawn: Generator) -> tuple[Tensor, Tensor]:
        """A and B of a new adapter, fp32 on the CPU, for the methods that have adapters beside the language model."""
        raise NotImplementedError

    def adapting(self, targets: str | Iterable[str]) -> LoraConfig:
        """PEFT's description of adapters on `targets`. PEFT matches these with the ends of modules' names."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.tuning.rank,
            lora_alpha=self.tuning.alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
            lora_dropout=self.tuning.dropout,
            target_modules=targets if isinstance(targets, str) else sorted(targets),
            **self.options,
        )

    def peft_config(self, architecture: Architecture) -> LoraConfig:
        """A layer that PEFT would take for an expert is named by its weight, in `target_parameters`."""
        config = self.adapting(self.ends(architecture))
        config.fan_in_fan_out = any(part.kind == "linear" and part.transposed for part in architecture.parameters)
        targets = set(config.target_modules or ())
        if taken := taken_for_experts(architecture, targets):
            config.target_modules = sorted(targets - set(taken))
            config.target_parameters = [f"{target}.weight" for target in taken]
            config.lora_dropout = 0.0  # for training alone; PEFT has none for parameters
        return config


@dataclass(frozen=True)
class LowRankUpdate:
    """scaling * up @ down, summed in fp32; up (outputs, rank), down (rank, inputs), in the type of the training."""

    up: Tensor
    down: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def apply_to(self, rows: Tensor, first: int) -> None:
        rows = rows.view(-1, self.shape[1])
        rows.copy_(self.product(first, len(rows)).add_(rows))

    def product(self, first: int, rows: int) -> Tensor:
        """Some rows of the matrix, as sums in fp32."""
        return (self.up[first : first + rows].float() @ self.down.float()).mul_(self.scaling)

    def change(self, first: int, rows: int, columns: slice = slice(None)) -> Tensor:
        return exact_product(self.up[first : first + rows], self.down[:, columns], self.scaling)


def low_rank_methods(tuning: Tuning) -> dict[str, LowRank]:
    """Name -> method, for every method that has LoRA's two matrices, made with these settings."""
    made = {name: make(tuning) for name, make in methods().items()}
    return {name: method for name, method in made.items() if isinstance(method, LowRank)}


def matching(architecture: Architecture, targets: Targets) -> dict[str, Linear]:
    """Path in the model -> each linear layer that `targets` name.

    A target is the end of a path, as in PEFT; or a pattern for the whole path, as in `tuning.train`; or `re:` and a
    regular expression for the whole path, as in PEFT."""
    linears = architecture.linear_layers()
    if targets == ALL_LINEAR:
        return linears
    patterns = [expression(target) for target in targets if is_pattern(target)]
    ends = tuple(f".{target}" for target in targets if not is_pattern(target))
    return {
        path: linear
        for path, linear in linears.items()
        if f".{path}".endswith(ends) or any(pattern.fullmatch(path) for pattern in patterns)
    }


def unknown_targets(architecture: Architecture, targets: Targets) -> list[str]:
    """One sentence for each target that names no layer of the base."""
    paths = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in architecture.linear_layers())
    return [
        (
            f"tuning.targets: {target!r} matches the path of no linear layer that can be adapted. The base has"
            f" {', '.join(paths)}."
            if is_pattern(target)
            else (
                f"tuning.targets: {target!r} is no linear layer that can be adapted. The base has"
                f" {', '.join(architecture.linear_names)}."
            )
        )
        for target in ([] if targets == ALL_LINEAR else targets)
        if not matching(architecture, [target])
    ]


def shortest_ends(architecture: Architecture, paths: Collection[str]) -> list[str]:
    """The shortest ends of `paths` that match no other module, sorted. PEFT matches names with the ends of paths.

    The last name alone is enough unless a module without an adapter has it too: one of another layer, or a stack of
    experts, which is a module if it is stored in 4 bits.
    """
    others: set[str] = set()
    for parameter in architecture.parameters:
        parts = parameter.name.split(".")
        others |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    others -= set(paths)
    by_name: dict[str, list[list[str]]] = {}
    for path in paths:
        by_name.setdefault(path.rpartition(".")[2], []).append(path.split("."))
    ends: set[str] = set()
    for alike in by_name.values():
        for length in range(1, max(map(len, alike)) + 1):
            found = {".".join(parts[-length:]) for parts in alike}
            # Compare without the leading dot, as PEFT does for the names of (IA)^3's feed-forward layers.
            if not any(other.endswith(tuple(found)) for other in others):
                break
        ends |= found
    return sorted(ends)


def taken_for_experts(architecture: Architecture, targets: Iterable[str]) -> list[str]:
    """Those of `targets` for which PEFT would adapt a mixture's experts instead of the layer, sorted."""
    return sorted(target for target in targets if target.rpartition(".")[2] in architecture.taken_for_experts)


def peft_files(config: PeftConfig, weights: dict[str, Tensor], model: Model, prefix: str = PREFIX) -> dict[str, bytes]:
    """The files of PEFT's folder. `weights` has PEFT's names without `prefix`, which is that of a wrapped model."""
    from safetensors.torch import save

    config.inference_mode = True
    config.base_model_name_or_path = model.base  # a Hub id stays one, not this machine's cache
    config.revision = model.revision
    with scratch_folder("export") as folder:
        config.save_pretrained(folder)
        settings = json.loads(Path(folder, PEFT_SETTINGS).read_bytes())
    for value in settings.values():
        if isinstance(value, list):
            value.sort()  # PEFT writes sets, whose order changes from one process to the next
    named = {f"{prefix}{name}": weight for name, weight in weights.items()}
    return {
        PEFT_WEIGHTS: save(named, metadata={"format": "pt"}),
        PEFT_SETTINGS: json.dumps(settings, indent=2, sort_keys=True).encode(),
    }


def with_peft_files(exported: ExportedFiles, weights: dict[str, Tensor], **settings: Any) -> ExportedFiles:
    """PEFT's folder with more in it: `weights` as in `peft_files`, and `settings` of the adapter's description."""
    from safetensors.torch import load, save

    named = {f"{PREFIX}{name}": weight.contiguous() for name, weight in weights.items()}
    described: dict[str, Any] = json.loads(exported.files[PEFT_SETTINGS])
    for key, value in settings.items():
        both = isinstance(value, list) and isinstance(described.get(key), list)
        described[key] = sorted({*described[key], *value}) if both else value
    files = {
        PEFT_WEIGHTS: save({**load(exported.files[PEFT_WEIGHTS]), **named}, metadata={"format": "pt"}),
        PEFT_SETTINGS: json.dumps(described, indent=2, sort_keys=True).encode(),
    }
    return replace(exported, files=files)
