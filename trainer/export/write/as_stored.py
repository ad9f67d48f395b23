"""The trained model in the base's own codes, written file by file: what was trained in 4 bits is served in 4 bits.

Each file is the base's own with other codes for the weights that have learnt something. The scales, the weights that
were not trained, and all other parts keep their bytes. The change of a weight, such as s B A of a low-rank adapter, is
computed in fp32 and is much smaller than the distance between two codes. trainer/model/held/dither.py moves codes by it
so that little of it is lost. It can also round to the nearest code, which gives most of the base back.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from trainer.base.base import Base
from trainer.base.describe.language_model import composite_class
from trainer.base.find.locate import describe_base
from trainer.base.load.load import DTYPES
from trainer.base.rows.packed_parts import Weight
from trainer.base.stored.shared.moving import AT_ONCE, Movable
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.export.card import CardContent, model_card, model_usage, sees
from trainer.export.destination import CARD, TRAINED, ExportProgress, Written
from trainer.export.figures import Rounding
from trainer.export.trained import check_written_as_stored, resolve_trained_base
from trainer.export.write.calibrated import Calibration, calibrate, rounded
from trainer.export.write.merged import (
    Change,
    ChangesOf,
    changed_files,
    changes_of_values,
    checkpoint_of_model,
    write_files,
)
from trainer.model.held import dither
from trainer.model.held.codes import Numbers
from trainer.state.checkpoint.learnt_weights import LearntWeights
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.safetensors_index import Joined, Stretch, TensorSource, as_bytes
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store
from trainer.tuning.method import Addition, WeightUpdate

IN_WORDS: Mapping[Rounding, str] = {
    "dither": "with a dither",
    "nearest": "to the nearest ones",
    "gptq": "by what its layers read on rows of the run's data",
}
ReadRows = Callable[[Store, Config, CheckpointManifest, int], list[Tensor]]
_ROWS = 64  # that rounding=gptq looks at
_CALIBRATED_AT_ONCE = 2**24  # as columns come one after another, few rows at once would take as long as many


@dataclass
class CodesMoved:
    """How many codes were looked at, and how many of them differ from the base's."""

    codes: int = 0
    moved: int = 0
    _lock: Lock = field(default_factory=Lock)

    def add(self, codes: int, moved: int) -> None:
        """Threads that edit pieces call it."""
        with self._lock:
            self.codes += codes
            self.moved += moved

    def facts(self, rounding: Rounding) -> dict[str, Any]:
        return {"rounding": rounding, "codes": self.codes, "codes_changed": self.moved}

    def sentence(self) -> str:
        share = self.moved / self.codes if self.codes else 0.0
        return f"{self.moved:,} of {self.codes:,} codes ({share:.2%}) are others than the base's."


def export_as_stored(
    folder: Store,
    destination: Store,
    step: int | None,
    *,
    rounding: Rounding,
    read_rows: ReadRows,
    progress: ExportProgress,
) -> Written:
    """Write the merged model of `step`, or of the newest whole checkpoint, as the base is stored.

    `read_rows` gives at most so many rows of the run's training data, if codes are rounded by them.

    Raises as `ExportFormat.write`.
    """
    manifest, config, method = checkpoint_of_model(folder, destination, step)
    check_written_as_stored(config, describe_base(config.model), rounding)
    base = resolve_trained_base(folder, config.model, manifest)
    what = (
        f"A model {TRAINED} by {config.tuning.method}: the adapter is merged into the codes of its base, which is"
        f" stored in {base.stored.readable}, and rounded {IN_WORDS[rounding]}. Scales and all other weights are the"
        " base's own."
    )
    usage = model_usage(composite_class(base.directory), sees=sees(folder, config, manifest))
    moved = CodesMoved()
    with scratch_folder("calibration") as scratch:
        calibration = None
        if rounding == "gptq":
            rows = read_rows(folder, config, manifest, _ROWS)
            updates = method.updates(LearntWeights(folder, manifest, DTYPES[config.model.dtype]), base.architecture)
            calibration = calibrate(base, updates, rows, Path(scratch), progress.say)
        changed = changed_files(folder, manifest, config, base, changes_in_codes(rounding, moved, calibration))
        content = CardContent("transformers", what, "finetune", usage)
        destination.put(CARD, model_card(folder, config, manifest, content))
        write_files(base, config, changed, destination, progress.written)
    return Written(manifest, moved.facts(rounding), (moved.sentence(),))


def changes_in_codes(
    rounding: Rounding, moved: CodesMoved | None = None, calibration: Calibration | None = None
) -> ChangesOf:
    """Return the function for a merge that keeps weights in the base's codes. `moved` counts the codes."""
    return partial(_changes, rounding=rounding, moved=moved or CodesMoved(), calibration=calibration)


def _changes(
    base: Base,
    name: str,
    source: Weight,
    update: WeightUpdate,
    more: int,
    *,
    rounding: Rounding,
    moved: CodesMoved,
    calibration: Calibration | None,
) -> Iterator[Change]:
    """Yield the changes of the stored tensors that the parameter `name` is made of, as `changes_of_values` does."""
    columns = update.shape[-1]
    whole = isinstance(source, Movable)
    if not whole and not (isinstance(source, Joined) and any(isinstance(part, Movable) for part in source.parts)):
        yield from changes_of_values(base, name, source, update, more)
        return
    if more:
        raise _unwritable(base, name, f"{more} more rows, for which there are no scales")
    # A weight that is one tensor is one stretch.
    joined = (
        source if isinstance(source, Joined) else Joined((source,), (Stretch(0, 0, prod(source.shape)),), source.shape)
    )
    for stretch, start in zip(joined.stretches, joined.starts, strict=True):
        part = joined.parts[stretch.part]
        if isinstance(part, TensorSource):
            yield Change(part, stretch.begin, stretch.numel, update, start)
            continue
        if not isinstance(part, Movable) or not _is_of_rows(part, stretch, columns):
            raise _unwritable(base, name, "another layout than the model")
        if part.by_columns and rounding == "gptq":
            raise ConfigError(
                f"rounding: gptq rounds the columns of a weight one after another, and {base.name} stores the transpose"
                f" of {name}. Leave rounding out."
            )
        if part.by_columns and not isinstance(update, Addition):
            raise _unwritable(base, name, "its transpose, in which this method cannot change a single row")
        of_part = OfPart(name, (start - stretch.begin) // columns, part.shape, update, rounding, calibration)
        units = prod(part.codes.shape) * _bytes_of(part) // part.unit
        first, count = (0, units) if part.by_columns else (stretch.begin // columns, stretch.numel // columns)
        coded = _Coded(part, units, of_part, moved, stretch.numel // count)
        yield Change(as_bytes(part.codes), first * part.unit, count * part.unit, coded, first * part.unit)


def _bytes_of(part: Movable) -> int:
    (begin, end) = part.codes.byte_range(0, 1)
    return end - begin


def _is_of_rows(part: Movable, stretch: Stretch, columns: int) -> bool:
    """Whether a stretch has whole rows of a parameter with so many columns, or the whole part if units are columns."""
    if part.shape[-1] != columns or stretch.begin % columns or stretch.numel % columns:
        return False
    return not part.by_columns or (stretch.begin, stretch.numel) == (0, prod(part.shape))


def _unwritable(base: Base, name: str, what: str) -> ConfigError:
    return ConfigError(
        f"as=stored: {base.name} stores {name} in codes that cannot be changed: it has {what}. Leave as out, which"
        " merges in 16 bits, or take --format peft."
    )


@dataclass(frozen=True)
class OfPart:
    """Return the change of a stored tensor of `shape`. Its weights are rows of the parameter `name`, from row `row`
    on."""

    name: str
    row: int
    shape: tuple[int, ...]
    update: WeightUpdate
    rounding: Rounding
    calibration: Calibration | None = None

    @property
    def at_once(self) -> int:
        return AT_ONCE if self.calibration is None else _CALIBRATED_AT_ONCE

    def moved(
        self, numbers: Numbers, codes: Tensor, steps: Tensor, scales: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        if self.calibration is not None and self.name in self.calibration.files:
            return rounded(numbers, codes, steps, scales, self.calibration.blocks(self.name))
        return dither.moved(numbers, codes, steps, self.thresholds(rows, columns))

    def of_rows(self, first: int, count: int, values: Callable[[], Tensor]) -> Tensor:
        first += self.row
        if isinstance(self.update, Addition):
            return self.update.change(first, count)
        before = values()
        after = before.clone()
        self.update.apply_to(after.view(-1), first)
        return after.sub_(before)

    def of_columns(self, matrix: int, first: int, last: int) -> Tensor:
        assert isinstance(self.update, Addition)
        rows = self.shape[-2]
        return self.update.change(self.row + matrix * rows, rows, slice(first, last)).T

    def thresholds(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        return dither.thresholds(self.name, self.row + rows, columns) if self.rounding != "nearest" else None


@dataclass(frozen=True)
class _Coded:
    """Return the update of the codes of a `part`: a matrix of bytes, one row for each unit of so many `weights`."""

    part: Movable
    units: int
    change: OfPart
    moved: CodesMoved
    weights: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.units, self.part.unit

    def apply_to(self, rows: Tensor, first: int) -> None:
        units = rows.view(-1, self.part.unit)
        moved = self.part.move(units, first, self.change)
        self.moved.add(len(units) * self.weights, moved)
