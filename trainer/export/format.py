"""The protocol of the formats that a run can be exported in. This file also finds a format by its name in `--format`.

A format is one file in trainer/export/formats/. Its `FORMATS` maps each name to a class whose fields are the options of
the format, given on the command line as `key=value`. Importing the file loads no torch, because the command line asks
every format for its name. Code that handles tensors imports torch when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from trainer.base.base import Description
from trainer.config import Config, parse_options
from trainer.config.registry import chosen, kinds
from trainer.export.destination import ExportProgress, Written
from trainer.export.figures import KeptProof, Proof
from trainer.store.store import Store

if TYPE_CHECKING:
    from trainer.export.write.foreseen import Foreseen


class ExportFormat(Protocol):
    """One form in which a run is exported, with its options."""

    what: ClassVar[str]
    """The export in a few words, to begin a sentence."""
    what_if_tuned: ClassVar[str]
    """The same for a run that has tuned the base itself."""
    whole_model: ClassVar[bool]
    """Whether base and adapter are merged; else the adapter alone is written."""

    def check(self, config: Config, base: Description) -> None:
        """Raise `ConfigError` if a run trained by `config` over `base` has no such export, as far as the settings and
        config.json tell. No torch.
        """
        ...

    def check_files(self, run: Foreseen) -> None:
        """Raise `ConfigError` if such a run has no such export, as far as `check` and the headers of the base's files,
        its tokenizer and the classes that load the export tell. This reads no weights.
        """
        ...

    def check_here(self) -> None:
        """Raise `ConfigError` if this machine lacks a program that the format needs."""
        ...

    def write(self, folder: Store, destination: Store, step: int | None, progress: ExportProgress) -> Written:
        """Export `step`, or the newest whole checkpoint.

        Raises:
            NothingToResume: the run has no such checkpoint.
            StorageError: the checkpoint is damaged, or a store fails.
            ConfigError: `destination` holds something other than a half export, or one of the checks raises it.
        """
        ...

    def prove(self, folder: Store, step: int, destination: Store) -> Proof | KeptProof:
        """Compare the predictions of the export in `destination` with those of the trained model of `step`.

        Every byte of the export has already been compared with a second export. Raises `ConfigError` if the predictions
        cannot be compared.
        """
        ...


def find_format(name: str, options: Sequence[str] = ()) -> ExportFormat:
    """Find the format that `--format` names, with its `key=value` options.

    Raises `ConfigError` if there is no such format, or an option is unknown or wrong.
    """
    return parse_options(chosen(kinds("trainer.export.formats", "FORMATS"), "--format", name), options)
