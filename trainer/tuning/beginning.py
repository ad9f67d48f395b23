"""The adapter that a run begins from, `tuning.start`: one that a run of ours has committed, or a LoRA adapter in PEFT's folder.

Its weights become those of the adapter before the first step. A run that resumes has weights of its own, and takes nothing from
here. Importing the file loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, cast

from trainer.base.base import Base
from trainer.checkpoint.contents import Key
from trainer.checkpoint.division import Interval
from trainer.checkpoint.listing import committed_steps
from trainer.checkpoint.manifest import CheckpointManifest, problems_of, readable_manifests
from trainer.checkpoint.reading import read_elements
from trainer.config import Config
from trainer.config.paths import local_path
from trainer.errors import ConfigError, StorageError, shown
from trainer.files.safetensors_index import TensorSource, read_header
from trainer.optimizer.optimizer import MASTER
from trainer.store import Buffer, Store, open_run_store, open_store
from trainer.tuning.method import Method, SavedByPeft
from trainer.tuning.shared.peft_folder import PREFIX, SETTINGS, WEIGHTS
from trainer.tuning.shared.wrapper import Around

SETTING = "tuning.start"
_CHECKPOINT = re.compile(r"(.+)/checkpoints/step-(\d{9})")
# Settings that do not belong to the weights.
_FREE = {"dropout"}
# PEFT's settings that give an adapter more than two matrices for each of its layers, or other ones for some.
_BEYOND = (
    "rank_pattern alpha_pattern modules_to_save trainable_token_indices target_parameters lora_bias layer_replication "
    "layers_pattern arrow_config use_bdlora"
).split()


class Values(NamedTuple):
    """Elements [begin, end) of a flattened parameter, as bytes of a `dtype` of safetensors."""

    name: str
    begin: int
    end: int
    dtype: str
    data: Buffer


class Beginning(Protocol):
    """An adapter to begin from."""

    @property
    def facts(self) -> dict[str, str]:
        """Its place, `start`, and a hash of its weights, `start_weights`, for the identity of what is trained on it."""
        ...

    def mismatches(self, config: Config, method: Method, base: Base) -> list[str]:
        """A sentence for each setting that would make another adapter than it is."""
        ...

    def check(self) -> None:
        """Raise `StorageError` where its files are not whole."""
        ...

    def read(self, wanted: Mapping[str, Interval]) -> Iterator[Values]:
        """The wanted elements of each parameter that learns, by its name in the model, each once."""
        ...


def find_beginning(config: Config, method: Method) -> Beginning | None:
    """The adapter that `tuning.start` names, for the run's `method`; None where it names none.

    Raises:
        ConfigError: there is neither an adapter nor a run with a checkpoint.
        StorageError: the store does not answer, or the adapter's files are damaged.
    """
    place = config.tuning.start
    if place is None:
        return None
    folder, step = _folder(config, place)
    if folder.exists(SETTINGS):
        return PeftFolder(place, folder, method)
    steps = committed_steps(folder)
    if step is not None and step not in steps:
        raise ConfigError(f"{SETTING}: {shown(place)} is no committed checkpoint. The run has {_listed(steps)}.")
    skipped: list[str] = []
    manifest = next(readable_manifests(folder, skipped, [step] if step is not None else steps), None)
    if manifest is None and skipped:
        raise StorageError(f"{SETTING}: {shown(place)} has no whole checkpoint: {skipped[0]}")
    if manifest is None:
        raise ConfigError(
            f"{SETTING}: {shown(place)} is no run with a checkpoint and no folder with {SETTINGS}. Give a run of this store by its name, "
            "or the path or URI of a run, of one of its checkpoints/step-... or of a PEFT folder."
        )
    return RunCheckpoint(place, folder, manifest)


def _folder(config: Config, place: str) -> tuple[Store, int | None]:
    """The folder of an adapter or of a run, and the step that is asked for."""
    if "/" not in place:
        return open_run_store(config).sub(place), None
    path = place.rstrip("/")
    where = path if "://" in path else str(local_path(path, SETTING))
    if (found := _CHECKPOINT.fullmatch(where)) is not None:
        return open_store(found[1], setting=SETTING), int(found[2])
    return open_store(where, setting=SETTING), None


def _listed(steps: Sequence[int]) -> str:
    return f"those of steps {', '.join(map(str, sorted(steps)))}" if steps else "none"


@dataclass(frozen=True)
class RunCheckpoint:
    """The adapter that a run has learnt, at the checkpoint of `manifest`."""

    place: str
    run: Store
    manifest: CheckpointManifest

    @property
    def facts(self) -> dict[str, str]:
        hashes = [shard.sha256 for shard in self.manifest.shards]
        step = f"step {self.manifest.step}"
        return {
            "start": f"{self.place}, {step}",
            "start_weights": hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
        }

    def mismatches(self, config: Config, method: Method, base: Base) -> list[str]:
        theirs = self.manifest.base
        if theirs.get("fingerprint") != base.fingerprint or theirs.get("layers") != config.model.layers:
            return [
                f"{SETTING}: {shown(self.place)} was trained over {theirs.get('name') or theirs.get('path')}, and model.base: "
                f"{config.model.base} is another base. Give that one."
            ]
        if theirs.get("add_tokens", []) != config.model.add_tokens:
            return [_unlike("model.add_tokens", theirs.get("add_tokens", []), self.place)]
        shapes = {name: list(shape) for name, shape in method.shapes(base.architecture).items()}
        free = _FREE | ({"targets"} if shapes == self.manifest.shapes else set())
        found = list(_unlike_settings(self.manifest.adapter, method.identity, method.defaults, free, self.place))
        if not found and shapes != self.manifest.shapes:
            found.append(
                f"{SETTING}: {shown(self.place)} has learnt other parameters than these settings of tuning have."
            )
        return found

    def check(self) -> None:
        if problems := problems_of(self.run, self.manifest):
            raise StorageError(f"{SETTING}: {shown(self.place)} is not whole: {problems[0]}")

    def read(self, wanted: Mapping[str, Interval]) -> Iterator[Values]:
        keys = {Key(name, MASTER): interval for name, interval in wanted.items()}
        for (key, begin, end), data in read_elements(self.run, self.manifest, keys):
            yield Values(key.name, begin, end, MASTER.dtype, data)


@dataclass(frozen=True)
class PeftFolder:
    """A LoRA adapter as PEFT saves it."""

    place: str
    folder: Store
    method: Method

    @cached_property
    def _settings(self) -> dict[str, Any]:
        try:
            settings = json.loads(self.folder.get(SETTINGS))
        except ValueError as error:
            raise StorageError(f"{SETTING}: {self.folder.uri}/{SETTINGS} is no JSON ({error}).") from error
        if not isinstance(settings, dict):
            raise StorageError(f"{SETTING}: {self.folder.uri}/{SETTINGS} is no description of an adapter.")
        return settings

    @cached_property
    def _tensors(self) -> dict[str, TensorSource]:
        if not self.folder.exists(WEIGHTS):
            raise ConfigError(
                f"{SETTING}: {shown(self.place)} has no {WEIGHTS}, and pickled weights are never read. Save the adapter again with PEFT."
            )
        return read_header(self.folder, WEIGHTS, self.folder.head(WEIGHTS).size)

    @property
    def facts(self) -> dict[str, str]:
        return {"start": self.place, "start_weights": hashlib.sha256(self.folder.get(WEIGHTS)).hexdigest()}

    def mismatches(self, config: Config, method: Method, base: Base) -> list[str]:
        theirs, kind = self._settings, self._settings.get("peft_type")
        if kind != "LORA" or isinstance(method, Around) or not isinstance(method, SavedByPeft):
            return [
                f"{SETTING}: {shown(self.place)} is an adapter of PEFT's kind {kind}, and tuning.method is {config.tuning.method}. Of "
                "PEFT's folders those of lora, rslora and dora are read, without experts, modules_to_save or add_tokens; others begin "
                "from a run."
            ]
        if beyond := [name for name in _BEYOND if theirs.get(name)]:
            return [f"{SETTING}: {shown(self.place)} has {beyond[0]}, which cannot be begun from. Begin from a run."]
        name = "dora" if theirs.get("use_dora") else "rslora" if theirs.get("use_rslora") else "lora"
        given = {"method": name, "rank": theirs.get("r"), "alpha": theirs.get("lora_alpha")}
        own = {key: value for key, value in method.identity.items() if key in given}
        return list(_unlike_settings(given, own, {}, set(), self.place)) or self._unlike_layers(method, base)

    def _unlike_layers(self, method: SavedByPeft, base: Base) -> list[str]:
        """A sentence where the file has other weights than the run's adapter."""
        ours = {f"{PREFIX}{method.saved_name(name)}": shape for name, shape in method.shapes(base.architecture).items()}
        theirs = {name: source.shape for name, source in self._tensors.items()}
        if ours.keys() == theirs.keys():
            other = next((name for name, shape in ours.items() if theirs[name] != tuple(shape)), None)
            return (
                []
                if other is None
                else [
                    f"{SETTING}: {shown(self.place)} is of another base: {other} has shape {list(theirs[other])}, and over model.base "
                    f"{list(ours[other])}. Give its base as model.base."
                ]
            )
        layers = dict.fromkeys(re.sub(r"\.lora_.*", "", name).rpartition(".")[2] for name in theirs)
        return [
            f"{SETTING}: {shown(self.place)} has {len(theirs)} weights, of {', '.join(layers)}, and tuning.targets would have "
            f"{len(ours)}. Set tuning.targets: [{', '.join(layers)}], or those of its layers that it has."
        ]

    def check(self) -> None:
        """Everything was read when it was found."""

    def read(self, wanted: Mapping[str, Interval]) -> Iterator[Values]:
        for name, (begin, end) in wanted.items():
            source = self._tensors[self._saved(self.method, name)]
            if begin < end:
                yield Values(name, begin, end, source.dtype, source.read(begin, end))

    def _saved(self, method: Method, name: str) -> str:
        return f"{PREFIX}{cast(SavedByPeft, method).saved_name(name)}"


def _unlike_settings(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], defaults: Mapping[str, Any], free: set[str], place: str
) -> Iterator[str]:
    """A sentence for each setting of `tuning` that is another one than the adapter has; of another method for that alone."""
    for key in sorted((theirs.keys() | ours.keys()) - free, key=lambda key: (key != "method", key)):
        before, now = (values.get(key, defaults.get(key)) for values in (theirs, ours))
        if before != now:
            yield _unlike(f"tuning.{key}", before, place)
            if key == "method":
                return


def _unlike(setting: str, theirs: Any, place: str) -> str:
    return f"{setting}: {SETTING}: {shown(place)} has {theirs!r}. Set {setting}: {theirs!r}, or begin from another adapter."
