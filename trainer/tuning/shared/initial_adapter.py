"""The adapter that a run begins from, `tuning.start`: one that a run of ours has committed, or a LoRA adapter in PEFT's
folder.

Its weights become those of the adapter before the first step. The first start names the checkpoint of a run in
`tuning.start`, as a run that goes on learning has another newest one by the next start. A run that resumes has weights
of its own, and takes nothing from here unless its stored reference has to be read again. Importing the file loads no
torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from trainer.base.base import Base
from trainer.base.find.content import content_of
from trainer.config import Config, Model
from trainer.config.paths import local_path
from trainer.errors import ConfigError, StorageError, shown
from trainer.run import layout
from trainer.state.checkpoint.contents import Key
from trainer.state.checkpoint.identity import check_content
from trainer.state.checkpoint.listing import committed_steps
from trainer.state.checkpoint.manifest import CheckpointManifest, problems_of, readable_manifests
from trainer.state.checkpoint.reading import read_elements
from trainer.state.optimizer.optimizer import MASTER, Interval
from trainer.store.store import Store, open_run_store, open_store
from trainer.tuning.method import Method, method_of
from trainer.tuning.shared.beginning import SETTING, Beginning, Values, unlike, unlike_settings
from trainer.tuning.shared.peft_beginning import PeftAdapter
from trainer.tuning.shared.peft_folder import SETTINGS

_CHECKPOINT = re.compile(r"(.+)/checkpoints/step-(\d{9})")
_OF_STORE = re.compile(r"([^/@]+)(?:@(\d{1,9}))?")
"""A run of the store by its name, and behind an @ one of its steps."""
_STEP = re.compile(r"@\d+$|/checkpoints/step-\d+$")
# Settings that do not belong to the weights.
_FREE = {"dropout", "init"}


def find_beginning(config: Config, method: Method) -> Beginning | None:
    """The adapter that `tuning.start` names, for the run's `method`; None where it names none.

    Raises:
        ConfigError: there is neither an adapter nor a run with a checkpoint.
        StorageError: the store does not answer, or the adapter's files are damaged.
    """
    place = config.tuning.start
    if place is None:
        return None
    return _Search(open_run_store(config), config.run.name, place, method, config.model).adapter()


def with_known_start(config: Config) -> Config:
    """`config` whose `tuning.start` names a checkpoint where it was a run. Raises as `find_beginning`."""
    beginning = find_beginning(config, method_of(config))
    return config if beginning is None else starting_at(config, beginning.place)


def starting_at(config: Config, place: str) -> Config:
    return config.model_copy(update={"tuning": config.tuning.model_copy(update={"start": place})})


def is_asked_for(there: str, place: str | None) -> bool:
    """Whether `there`, which names a checkpoint where it was a run, is what a `tuning.start` of `place` began from."""
    return place is not None and place.rstrip("/") in (there, _STEP.sub("", there))


@dataclass(frozen=True)
class _Search:
    """A search for the adapter at `place`, by the run of this name, method and base; a bare name is that of one of
    `runs`.
    """

    runs: Store
    run: str
    place: str
    method: Method
    model: Model

    def adapter(self) -> Beginning:
        return self._begun() or self._found(self.place)

    def _begun(self) -> Begun | None:
        """The adapter by what the run's own checkpoints say of it, where they began from that place, or from a step of
        the run there: ranks that torchrun starts again have the configuration that the first start was given."""
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
        folder, step = place_of(self.runs, place, SETTING)
        if folder.exists(SETTINGS):
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
                f"{SETTING}: {shown(place)} is no run with a checkpoint and no folder with {SETTINGS}. Give a run of"
                " this store by its name, or the path or URI of a run, of one of its checkpoints/step-... or of a PEFT"
                " folder."
            )
        return RunCheckpoint(_at_step(place, manifest.step), folder, manifest)


def place_of(runs: Store, place: str, setting: str) -> tuple[Store, int | None]:
    """The folder of an adapter or of a run that `setting` names, and the step that is asked for; a bare name is one of
    `runs`.
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
    """The checkpoint of `step` of the run at `place`, or of its name, which may have one already."""
    if "/" not in place:
        return f"{place.partition('@')[0]}@{step}"
    run = place.rstrip("/")
    return run if _CHECKPOINT.fullmatch(run) else f"{run}/{layout.checkpoint(step)}".rstrip("/")


@dataclass(frozen=True)
class RunCheckpoint:
    """The adapter that a run has learnt, at the checkpoint of `manifest`."""

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

    def read(self, wanted: Mapping[str, Interval]) -> Iterator[Values]:
        keys = {Key(name, MASTER): interval for name, interval in wanted.items()}
        for (key, begin, end), data in read_elements(self.run, self.manifest, keys):
            yield Values(key.name, begin, end, MASTER.dtype, data)


@dataclass(frozen=True)
class Begun:
    """An adapter that the run has begun from in an earlier start. It is looked for only where somebody wants its
    weights, and need not be there any more otherwise: the run that it is of may have gone on and removed that
    checkpoint."""

    begun: ClassVar[bool] = True
    facts: dict[str, Any]
    find: Callable[[], Beginning]

    @property
    def place(self) -> str:
        return self.facts["start"]

    def differences(self, config: Config, method: Method, base: Base) -> list[str]:
        """The settings are compared with those of the run's own checkpoints."""
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

    def read(self, wanted: Mapping[str, Interval]) -> Iterator[Values]:
        return self._again.read(wanted)
