"""A LoRA adapter in a folder that PEFT has written, as what a run begins from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

from trainer.base.base import Base
from trainer.base.describe.architecture_cache import read_adapter_paths
from trainer.base.find.locate import base_files, describe_base
from trainer.config import Config, Model
from trainer.errors import NOT_JSON, ConfigError, StorageError, shown
from trainer.state.optimizer.optimizer import Interval
from trainer.store.safetensors_index import TensorSource, read_header
from trainer.store.store import Store
from trainer.tuning.method import Method
from trainer.tuning.shared.beginning import SETTING, Values, unlike_settings
from trainer.tuning.shared.linear_adapters import LowRank, low_rank_methods
from trainer.tuning.shared.peft_folder import PREFIX, SETTINGS, WEIGHTS

# PEFT's settings that give an adapter more than two matrices for each of its layers, or other ones for some.
_BEYOND = (
    "rank_pattern alpha_pattern modules_to_save trainable_token_indices target_parameters lora_bias layer_replication "
    "layers_pattern arrow_config use_bdlora alora_invocation_tokens use_qalora monteclora_config kasa_config"
).split()
# PEFT's `init_lora_weights` that leave the base as it is. The others, such as pissa and olora, take a part out of its
# weights, which are another base's then.
_BESIDE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


def _last_name(base: str) -> str:
    """A base without the folder or the account that it is in: many machines have copies."""
    return base.strip().rstrip("/").replace("\\", "/").rpartition("/")[2].casefold()


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter as PEFT saves it: by the names in the class that people load, or in the language model of it
    alone.
    """

    begun: ClassVar[bool] = False
    place: str
    folder: Store
    method: Method
    model: Model

    @cached_property
    def _settings(self) -> dict[str, Any]:
        try:
            settings = json.loads(self.folder.get(SETTINGS))
        except NOT_JSON as error:
            raise StorageError(f"{SETTING}: {self.folder.uri}/{SETTINGS} is no JSON ({error}).") from error
        if not isinstance(settings, dict):
            raise StorageError(f"{SETTING}: {self.folder.uri}/{SETTINGS} is no description of an adapter.")
        return settings

    @cached_property
    def _tensors(self) -> dict[str, TensorSource]:
        if not self.folder.exists(WEIGHTS):
            raise ConfigError(
                f"{SETTING}: {shown(self.place)} has no {WEIGHTS}, and pickled weights are never read. Save the adapter"
                " again with PEFT."
            )
        return read_header(self.folder, WEIGHTS, self.folder.head(WEIGHTS).size)

    @property
    def facts(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for chunk in self.folder.chunks(WEIGHTS, self.folder.head(WEIGHTS).size):
            digest.update(chunk)
        return {"start": self.place, "start_weights": digest.hexdigest()}

    def differences(self, config: Config, method: Method, base: Base) -> list[str]:
        theirs, kind = self._settings, self._settings.get("peft_type")
        low_rank = low_rank_methods(config.tuning)
        if kind != "LORA" or not isinstance(method, LowRank):
            return [
                f"{SETTING}: {shown(self.place)} is an adapter of PEFT's kind {kind}, and tuning.method is"
                f" {config.tuning.method}. Of PEFT's folders those of {', '.join(low_rank)} are read, without experts,"
                " modules_to_save or add_tokens; others begin from a run."
            ]
        if beyond := [name for name in _BEYOND if theirs.get(name)]:
            return [f"{SETTING}: {shown(self.place)} has {beyond[0]}, which cannot be begun from. Begin from a run."]
        if (init := theirs.get("init_lora_weights")) not in _BESIDE_THE_BASE:
            return [
                f"{SETTING}: {shown(self.place)} has init_lora_weights {init!r}, so it fits a base that PEFT has"
                " changed. Save it again with path_initial_model_for_weight_conversion, or begin from a run."
            ]
        options = {name for other in low_rank.values() for name in other.options}
        asked = {name for name in options if theirs.get(name)}
        alike = [name for name, other in low_rank.items() if {key for key, on in other.options.items() if on} == asked]
        name = alike[0] if alike else " and ".join(sorted(asked))
        given = {"method": name, "rank": theirs.get("r"), "alpha": theirs.get("lora_alpha")}
        own = {key: value for key, value in method.identity.items() if key in given}
        return list(unlike_settings(given, own, {}, set(), self.place)) or self._unlike_layers() or self._other_base()

    def _other_base(self) -> list[str]:
        """A sentence where the adapter says that it was made over a base of another name: its weights would fit one of
        the same shapes, and mean nothing there."""
        theirs, ours = self._settings.get("base_model_name_or_path"), self.model.base
        if not isinstance(theirs, str) or not theirs.strip() or _last_name(theirs) == _last_name(ours):
            return []
        return [
            f"{SETTING}: {shown(self.place)} was made over the base {shown(theirs)} (base_model_name_or_path in its"
            f" {SETTINGS}), and model.base is {ours}. Give the base that it was made over, or, where both are the same"
            " weights, write this run's into that file."
        ]

    def _unlike_layers(self) -> list[str]:
        """A sentence where the file has other weights than the run's adapter."""
        ours, theirs = {self._saved[name]: shape for name, shape in self._shapes.items()}, self._tensors
        if ours.keys() == theirs.keys():
            other = next((name for name, shape in ours.items() if theirs[name].shape != tuple(shape)), None)
            return (
                []
                if other is None
                else [
                    f"{SETTING}: {shown(self.place)} is of another base: {other} has shape {list(theirs[other].shape)},"
                    f" and over model.base {list(ours[other])}. Give its base as model.base."
                ]
            )
        layers, targets = (dict.fromkeys(_layer(name).rpartition(".")[2] for name in names) for names in (theirs, ours))
        if ours.keys() < theirs.keys() and layers.keys() == targets.keys():
            outside = next(_layer(name) for name in theirs if name not in ours)
            return [
                f"{SETTING}: {shown(self.place)} has weights of {outside.removeprefix(PREFIX)}, which this run does not"
                " train: it takes the linear layers of the language model. Begin from an adapter of these alone."
            ]
        return [
            f"{SETTING}: {shown(self.place)} has {len(theirs)} weights, of {', '.join(layers)}, and tuning.targets"
            f" would have {len(ours)}. Set tuning.targets: [{', '.join(layers)}], or those of its layers that it has."
        ]

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.method.shapes(describe_base(self.model).architecture)

    @cached_property
    def _saved(self) -> Mapping[str, str]:
        """The name in the file of each parameter that learns; where the file does not have it, that in the language
        model alone.
        """
        alone = {name: f"{PREFIX}{cast(LowRank, self.method).saved_name(name)}" for name in self._shapes}
        if all(saved in self._tensors for saved in alone.values()):
            return alone
        layers = sorted({_layer(saved).removeprefix(PREFIX) for saved in alone.values()})
        there = {_layer(name).removeprefix(PREFIX) for name in self._tensors}
        paths = read_adapter_paths(base_files(self.model), self.model.layers, layers, self.model.base)
        found = {layer: next((path for path in paths[layer] if path in there), layer) for layer in layers}
        return {
            name: f"{PREFIX}{found[_layer(saved).removeprefix(PREFIX)]}{saved.removeprefix(_layer(saved))}"
            for name, saved in alone.items()
        }

    def check(self) -> None:
        """Everything was read when it was found."""

    def read(self, wanted: Mapping[str, Interval]) -> Iterator[Values]:
        for name, (begin, end) in wanted.items():
            source = self._tensors[self._saved[name]]
            if begin < end:
                yield Values(name, begin, end, source.dtype, source.read(begin, end))


def _layer(saved: str) -> str:
    """The path of the layer whose weight has this name in PEFT's file, with the prefix of the wrapped model's names."""
    return saved.partition(".lora_")[0]
