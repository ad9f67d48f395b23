"""The protocol of an adapter to begin from, and the sentence for a setting that would make another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from trainer.base.base import Base
from trainer.config import Config
from trainer.errors import shown
from trainer.state.optimizer.optimizer import Interval
from trainer.store.store import Buffer
from trainer.tuning.method import Method

SETTING = "tuning.start"


class Values(NamedTuple):
    """Elements [begin, end) of a flattened parameter, as bytes of a `dtype` of safetensors."""

    name: str
    begin: int
    end: int
    dtype: str
    data: Buffer


class Beginning(Protocol):
    """An adapter to begin from. `begun`: the run has done so, and its checkpoints have its weights."""

    begun: ClassVar[bool]

    @property
    def place(self) -> str:
        """The value of `tuning.start` that names this adapter at every later start, too."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """Its place, `start`, and a hash of its weights, `start_weights`, for the identity of what is trained on it; of
        a run the fingerprints of the data that it has learnt from, `start_data`."""
        ...

    def differences(self, config: Config, method: Method, base: Base) -> list[str]:
        """A sentence for each setting that would make another adapter than it is."""
        ...

    def check(self) -> None:
        """Raise `StorageError` where its files are not whole."""
        ...

    def read(self, wanted: Mapping[str, Interval]) -> Iterator[Values]:
        """The wanted elements of each parameter that learns, by its name in the model, each once."""
        ...


def unlike_settings(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], defaults: Mapping[str, Any], free: set[str], place: str
) -> Iterator[str]:
    """A sentence for each setting of `tuning` that is another one than the adapter has; of another method for that
    alone.
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
