"""The seam of the formats that a run can be exported in, and how one is found by its name in `--format`.

A format is one file in trainer/export/formats/. Its `FORMATS` maps each name to a class whose fields are the options of
the format, given on the command line as `key=value`. Importing the file loads no torch, as the command line asks every
format for its name; code that handles tensors imports torch when it is called.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from trainer.base.base import Description
from trainer.config import Config, parse_options
from trainer.config.registry import chosen, kinds
from trainer.export.figures import Proof
from trainer.export.folder import BytesWritten
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.store import Store

WHOLE_MODEL = "the whole model (its base was tuned, so an export and a merge are the same)"


class ExportProgress(NamedTuple):
    """`written` is told of bytes done and bytes in all, `say` of what begins now, in a sentence."""

    written: BytesWritten
    say: Callable[[str], None]


def print_bytes(done: int, total: int) -> None:
    """Prints them in a line that the launcher reads: one for each piece of some MiB, which costs nothing beside reading
    it.
    """
    print("progress", done, total, flush=True)


@dataclass(frozen=True)
class Written:
    """An export that was written: the checkpoint it is of, and what its format found out, as JSON and in sentences."""

    manifest: CheckpointManifest
    facts: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


class ExportFormat(Protocol):
    """One form in which a run is exported, with its options."""

    what: ClassVar[str]
    """The export in a few words, to begin a sentence."""
    what_if_tuned: ClassVar[str]
    """The same for a run that has tuned the base itself."""
    whole_model: ClassVar[bool]
    """Whether base and adapter are merged; else the adapter alone is written."""

    def check(self, config: Config, base: Description) -> None:
        """Raises `ConfigError` where a run trained by `config` over `base` has no such export; reads no weights."""
        ...

    def write(self, folder: Store, destination: Store, step: int | None, progress: ExportProgress) -> Written:
        """Export `step`, or the newest whole checkpoint.

        Raises:
            NothingToResume: the run has no such checkpoint.
            StorageError: it is damaged, or a store fails.
            ConfigError: `destination` holds something that is no half export, or as `check`.
        """
        ...

    def prove(self, folder: Store, step: int, destination: Store) -> Proof:
        """Compare the predictions of what is in `destination`, every byte of which has been compared with a second
        export, with those of the trained model of `step`. Raises `ConfigError` where that cannot be done."""
        ...


def find_format(name: str, options: Sequence[str] = ()) -> ExportFormat:
    """The format that `--format` names, with its `key=value` options. Raises `ConfigError` where there is none, or an
    option is unknown or wrong."""
    return parse_options(chosen(kinds("trainer.export.formats", "FORMATS"), "--format", name), options)
