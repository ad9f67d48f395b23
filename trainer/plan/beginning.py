"""The adapter that a run begins from, `tuning.start`.

It is a checkpoint of another run (`RunCheckpoint`), or a LoRA adapter in a folder that PEFT wrote (`PeftAdapter`). In a
run that already began from one of them in an earlier start it is a `Begun`.

trainer/train/start.py loads its weights before the first step. If `tuning.start` names a run, the first start replaces
it by the checkpoint that it found, because that run may write newer ones before the next start. A run that resumes has
its own weights, and needs these only if its stored reference has to be read again.
Importing the file loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, cast

from trainer.base.base import Base
from trainer.base.describe.architecture_cache import read_adapter_paths
from trainer.base.find.check import content_of
from trainer.base.find.locate import base_files, describe_base
from trainer.config import Config, Model
from trainer.config.paths import local_path
from trainer.errors import NOT_JSON, ConfigError, StorageError, shown
from trainer.run import layout
from trainer.state.checkpoint.identity import check_content
from trainer.state.checkpoint.manifest import (
    CheckpointManifest,
    committed_steps,
    problems_of,
    read_elements,
    readable_manifests,
)
from trainer.state.checkpoint.shard import Key
from trainer.state.optimizer import MASTER, Interval
from trainer.store.safetensors_index import TensorSource, read_header
from trainer.store.store import Buffer, Store, open_run_store, open_store
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS, PREFIX, LowRank, low_rank_methods
from trainer.tuning.method import Method, method_of

SETTING = "tuning.start"


class Elements(NamedTuple):
    """Elements [begin, end) of a flattened parameter, as bytes. `dtype` is safetensors' name of their type."""

    name: str
    begin: int
    end: int
    dtype: str
    data: Buffer


class Beginning(Protocol):
    """An adapter to begin from. With `begun` the run already did, and its checkpoints continue from those weights."""

    begun: ClassVar[bool]

    @property
    def place(self) -> str:
        """The value of `tuning.start` that still names this adapter at every later start."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """Facts for the identity of the new run: its place `start`, and `start_weights`, a hash of its weights.

        For a run's checkpoint also `start_data`, the fingerprints of the data that it learnt from."""
        ...

    def differences(self, config: Config, method: Method, base: Base) -> list[str]:
        """One sentence for each setting that would make a different adapter than this one."""
        ...

    def check(self) -> None:
        """Raise `StorageError` if its files are incomplete or damaged."""
        ...

    def read(self, wanted: Mapping[str, Interval]) -> Iterator[Elements]:
        """Yield the wanted elements of each trained parameter, by its name in the model, each exactly once."""
        ...


def unlike_settings(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], defaults: Mapping[str, Any], free: set[str], place: str
) -> Iterator[str]:
    """One sentence for each setting of `tuning` that differs from the adapter's.

    If the method differs, that is the only sentence.
    """
    for key in sorted((theirs.keys() | ours.keys()) - free, key=lambda key: (key != "method", key)):
        before, now = (values.get(key, defaults.get(key)) for values in (theirs, ours))
        if before != now:
            yield unlike(f"tuning.{key}", before, place)
            if key == "method":
                return


def unlike(setting: str, theirs: Any, place: str) -> str:
    return (
        f"{setting}: {SETTING}: {shown(place)} has {theirs!r}. Set {setting}: {theirs!r}, or begin from another"
        " adapter."
    )


_CHECKPOINT = re.compile(r"(.+)/checkpoints/step-(\d{9})")
_OF_STORE = re.compile(r"([^/@]+)(?:@(\d{1,9}))?")
"""A run of the store by its name, and behind an @ one of its steps."""
_STEP = re.compile(r"@\d+$|/checkpoints/step-\d+$")
# Settings that may differ, because the weights do not depend on them.
_FREE = {"dropout", "init", "through"}


def find_beginning(config: Config, method: Method) -> Beginning | None:
    """The adapter that `tuning.start` names, for the run's `method`; None where it names none.

    Raises:
        ConfigError: the place has neither an adapter nor a run with a checkpoint.
        StorageError: the store does not answer, or the adapter's files are damaged.
    """
    place = config.tuning.start
    if place is None:
        return None
    return _Search(open_run_store(config), config.run.name, place, method, config.model).adapter()


def with_known_start(config: Config) -> Config:
    """`config`, in which `tuning.start` names a checkpoint if it named a run. Raises as `find_beginning`."""
    beginning = find_beginning(config, method_of(config))
    return config if beginning is None else starting_at(config, beginning.place)


def starting_at(config: Config, place: str) -> Config:
    return config.model_copy(update={"tuning": config.tuning.model_copy(update={"start": place})})


def is_asked_for(there: str, place: str | None) -> bool:
    """Return whether a run with `tuning.start: place` began from `there`. If `place` is a run, `there` is one of its
    checkpoints."""
    return place is not None and place.rstrip("/") in (there, _STEP.sub("", there))


@dataclass(frozen=True)
class _Search:
    """A search for the adapter at `place`, for a run with this name, method and base.

    A place without a path is the name of one of `runs`.
    """

    runs: Store
    run: str
    place: str
    method: Method
    model: Model

    def adapter(self) -> Beginning:
        return self._begun() or self._found(self.place)

    def _begun(self) -> Begun | None:
        """The adapter as the run's own checkpoints record it, if they began from that place.

        They may also have begun from a step of the run at that place: ranks that torchrun restarts still have the
        configuration that the first start was given."""
        own = self.runs.sub(self.run)
        manifest = next(readable_manifests(own, [], committed_steps(own)), None)
        if manifest is None or "start" not in manifest.base:
            return None
        there: str = manifest.base["start"]
        if not is_asked_for(there, self.place):
            return None
        facts = {
            name: value for name, value in manifest.base.items() if name in ("start", "start_weights", "start_data")
        }
        return Begun(facts, lambda: self._found(there))

    def _found(self, place: str) -> Beginning:
        folder, step = beginning_place(self.runs, place, SETTING)
        if folder.exists(PEFT_SETTINGS):
            return PeftAdapter(place, folder, self.method, self.model)
        steps = committed_steps(folder)
        if step is not None and step not in steps:
            there = f"those of steps {', '.join(map(str, sorted(steps)))}" if steps else "none"
            raise ConfigError(f"{SETTING}: {shown(place)} is no committed checkpoint. The run has {there}.")
        skipped: list[str] = []
        manifest = next(readable_manifests(folder, skipped, [step] if step is not None else steps), None)
        if manifest is None and skipped:
            raise StorageError(f"{SETTING}: {shown(place)} has no whole checkpoint: {skipped[0]}")
        if manifest is None:
            raise ConfigError(
                f"{SETTING}: {shown(place)} is no run with a checkpoint and no folder with {PEFT_SETTINGS}. Give a run"
                " of this store by its name, or the path or URI of a run, of one of its checkpoints/step-... or of a"
                " PEFT folder."
            )
        return RunCheckpoint(_at_step(place, manifest.step), folder, manifest)


def beginning_place(runs: Store, place: str, setting: str) -> tuple[Store, int | None]:
    """The folder of the adapter or run that `setting` names at `place`, and the step if `place` has one.

    A place without a path is the name of one of `runs`.
    """
    if "/" not in place:
        if (named := _OF_STORE.fullmatch(place)) is None:
            raise ConfigError(f"{setting}: {shown(place)} is no name of a run. Give NAME, NAME@STEP, a path or a URI.")
        return runs.sub(named[1]), int(named[2]) if named[2] else None
    path = place.rstrip("/")
    where = path if "://" in path else str(local_path(path, setting))
    if (found := _CHECKPOINT.fullmatch(where)) is not None:
        return open_store(found[1], setting=setting), int(found[2])
    return open_store(where, setting=setting), None


def _at_step(place: str, step: int) -> str:
    """Name the checkpoint of `step` of the run at `place`, a path or a name. A step that `place` has is replaced."""
    if "/" not in place:
        return f"{place.partition('@')[0]}@{step}"
    run = place.rstrip("/")
    return run if _CHECKPOINT.fullmatch(run) else f"{run}/{layout.checkpoint(step)}".rstrip("/")


@dataclass(frozen=True)
class RunCheckpoint:
    """The adapter that a run learnt, in the checkpoint of `manifest`."""

    begun: ClassVar[bool] = False
    place: str
    run: Store
    manifest: CheckpointManifest

    @property
    def facts(self) -> dict[str, Any]:
        hashes = [shard.sha256 for shard in self.manifest.shards]
        return {
            "start": self.place,
            "start_weights": hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
            "start_data": [*self.manifest.base.get("start_data", []), self.manifest.dataset],
        }

    def differences(self, config: Config, method: Method, base: Base) -> list[str]:
        theirs = self.manifest.base
        if theirs.get("fingerprint") != base.fingerprint or theirs.get("layers") != config.model.layers:
            return [
                f"{SETTING}: {shown(self.place)} was trained over {theirs.get('name') or theirs.get('path')}, and"
                f" model.base: {config.model.base} is another base. Give that one."
            ]
        try:
            check_content(self.manifest, {"name": base.name, "path": base.name, **content_of(base)})
        except ConfigError as error:
            return [f"{SETTING}: {shown(self.place)} was trained over another base: {error}"]
        if theirs.get("add_tokens", []) != config.model.add_tokens:
            return [unlike("model.add_tokens", theirs.get("add_tokens", []), self.place)]
        shapes = {name: list(shape) for name, shape in method.shapes(base.architecture).items()}
        free = _FREE | ({"targets"} if shapes == self.manifest.shapes else set())
        found = list(unlike_settings(self.manifest.adapter, method.identity, method.defaults, free, self.place))
        if not found and shapes != self.manifest.shapes:
            found.append(
                f"{SETTING}: {shown(self.place)} has learnt other parameters than these settings of tuning have."
            )
        return found

    def check(self) -> None:
        if problems := problems_of(self.run, self.manifest):
            raise StorageError(f"{SETTING}: {shown(self.place)} is not whole: {problems[0]}")

    def read(self, wanted: Mapping[str, Interval]) -> Iterator[Elements]:
        keys = {Key(name, MASTER): interval for name, interval in wanted.items()}
        for (key, begin, end), data in read_elements(self.run, self.manifest, keys):
            yield Elements(key.name, begin, end, MASTER.dtype, data)


@dataclass(frozen=True)
class Begun:
    """An adapter that the run began from in an earlier start.

    It is looked up only when somebody reads its weights. Otherwise it may be gone: the run that wrote it may have gone
    on and removed that checkpoint."""

    begun: ClassVar[bool] = True
    facts: dict[str, Any]
    find: Callable[[], Beginning]

    @property
    def place(self) -> str:
        return self.facts["start"]

    def differences(self, config: Config, method: Method, base: Base) -> list[str]:
        """Always empty: the run's settings are compared with those of its own checkpoints instead."""
        return []

    @cached_property
    def _again(self) -> Beginning:
        found = self.find()
        if found.facts["start_weights"] != self.facts["start_weights"]:
            raise ConfigError(
                f"{SETTING}: {shown(self.place)} has other weights than the run began from. Put those back."
            )
        return found

    def check(self) -> None:
        self._again.check()

    def read(self, wanted: Mapping[str, Interval]) -> Iterator[Elements]:
        return self._again.read(wanted)


# PEFT's settings that give a layer more than two matrices, or give some layers different ones.
_BEYOND = (
    "rank_pattern alpha_pattern modules_to_save trainable_token_indices target_parameters lora_bias layer_replication "
    "layers_pattern arrow_config use_bdlora alora_invocation_tokens use_qalora monteclora_config kasa_config"
).split()
# The values of PEFT's `init_lora_weights` that leave the base unchanged. The others, such as pissa and olora, subtract
# a part from the base's weights, so their adapter fits only that changed base.
_BESIDE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


def _last_name(base: str) -> str:
    """The last part of a base's name. Copies of one base lie in other folders or accounts."""
    return base.strip().rstrip("/").replace("\\", "/").rpartition("/")[2].casefold()


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter as PEFT saves it.

    Its names are those of the class that users load, or those of the language model inside that class.
    """

    begun: ClassVar[bool] = False
    place: str
    folder: Store
    method: Method
    model: Model

    @cached_property
    def _settings(self) -> dict[str, Any]:
        try:
            settings = json.loads(self.folder.get(PEFT_SETTINGS))
        except NOT_JSON as error:
            raise StorageError(f"{SETTING}: {self.folder.uri}/{PEFT_SETTINGS} is no JSON ({error}).") from error
        if not isinstance(settings, dict):
            raise StorageError(f"{SETTING}: {self.folder.uri}/{PEFT_SETTINGS} is no description of an adapter.")
        return settings

    @cached_property
    def _tensors(self) -> dict[str, TensorSource]:
        if not self.folder.exists(PEFT_WEIGHTS):
            raise ConfigError(
                f"{SETTING}: {shown(self.place)} has no {PEFT_WEIGHTS}, and pickled weights are never read. Save the"
                " adapter again with PEFT."
            )
        return read_header(self.folder, PEFT_WEIGHTS, self.folder.head(PEFT_WEIGHTS).size)

    @property
    def facts(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for chunk in self.folder.chunks(PEFT_WEIGHTS, self.folder.head(PEFT_WEIGHTS).size):
            digest.update(chunk)
        return {"start": self.place, "start_weights": digest.hexdigest()}

    def differences(self, config: Config, method: Method, base: Base) -> list[str]:
        theirs, kind = self._settings, self._settings.get("peft_type")
        low_rank = low_rank_methods(config.tuning)
        if kind != "LORA" or not isinstance(method, LowRank):
            return [
                f"{SETTING}: {shown(self.place)} is an adapter of PEFT's kind {kind}, and tuning.method is"
                f" {config.tuning.method}. Of PEFT's folders those of {', '.join(low_rank)} are read, without experts,"
                " modules_to_save, towers or add_tokens; others begin from a run."
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
        """A sentence if the adapter names another base.

        Its weights would load into any base of the same shapes, but mean nothing there."""
        theirs, ours = self._settings.get("base_model_name_or_path"), self.model.base
        if not isinstance(theirs, str) or not theirs.strip() or _last_name(theirs) == _last_name(ours):
            return []
        return [
            f"{SETTING}: {shown(self.place)} was made over the base {shown(theirs)} (base_model_name_or_path in its"
            f" {PEFT_SETTINGS}), and model.base is {ours}. Give the base that it was made over, or, where both are the"
            " same weights, write this run's into that file."
        ]

    def _unlike_layers(self) -> list[str]:
        """A sentence if the file holds different weights than the run's adapter has."""
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
        """Trained parameter -> its name in the file. A name that the file lacks is that of the language model alone."""
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
        """Does nothing: everything was read when the adapter was found."""

    def read(self, wanted: Mapping[str, Interval]) -> Iterator[Elements]:
        for name, (begin, end) in wanted.items():
            source = self._tensors[self._saved[name]]
            if begin < end:
                yield Elements(name, begin, end, source.dtype, source.read(begin, end))


def _layer(saved: str) -> str:
    """The path of the layer whose weight has this name in PEFT's file. It keeps the prefix of the wrapped model."""
    return saved.partition(".lora_")[0]
