"""The trained model in codes that its base is not stored in: INT4, NVFP4, MXFP4 or FP8, made of a base in 16 bits.

The base's weights are quantized first, to the nearest codes, and what was learnt then moves these codes by a dither, as
in a merge as stored (trainer/export/write/as_stored.py). Quantizing the merged weights instead loses most of a small
change. Files are written as by trainer/export/write/recoded.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from trainer.base.base import Base
from trainer.base.describe.language_model import composite_class
from trainer.base.find.locate import describe_base
from trainer.base.load.load import DTYPES
from trainer.base.partitions.filling import as_tensor
from trainer.base.partitions.reading import cut
from trainer.base.rows.packed_parts import Weight
from trainer.base.rows.parameters import FoundWeights, find_all_weights
from trainer.config import Config
from trainer.export.card import CardContent, model_card, model_usage
from trainer.export.destination import CARD, TRAINED, ExportProgress, Written
from trainer.export.figures import Rounding
from trainer.export.trained import check_mergeable_run, resolve_trained_base
from trainer.export.write.as_stored import IN_WORDS, CodesMoved, OfPart
from trainer.export.write.decoded import as_plain
from trainer.export.write.merged import (
    Change,
    changes_of_values,
    checkpoint_of_model,
    files_with,
)
from trainer.export.write.recoded import Recoding, choose, write_recoded, written
from trainer.model.held.grids import GRIDS, Grid, second_of_nvfp4
from trainer.state.checkpoint.learnt_weights import LearntWeights
from trainer.store.safetensors_index import TensorSource, numel
from trainer.store.store import Store
from trainer.tuning.method import WeightUpdate


def export_in_codes(
    folder: Store, destination: Store, step: int | None, code: str, *, rounding: Rounding, progress: ExportProgress
) -> Written:
    """Write the model of `step`, or of the newest whole checkpoint, in the code of this name.

    Raises as `ExportFormat.write`.
    """
    manifest, config, method = checkpoint_of_model(folder, destination, step)
    check_mergeable_run(config, describe_base(config.model))
    base = as_plain(resolve_trained_base(folder, config.model, manifest))
    grid = GRIDS[code]
    what = (
        f"A model {TRAINED} by {config.tuning.method}: its base is quantized to {code}, and the adapter is merged into"
        f" these codes and rounded {IN_WORDS[rounding]}."
    )
    usage = model_usage(composite_class(base.directory))
    recoding = choose(base, grid)
    destination.put(CARD, model_card(folder, config, manifest, CardContent("transformers", what, "quantized", usage)))
    learnt = LearntWeights(folder, manifest, DTYPES[config.model.dtype])
    updates = method.updates(learnt, base.architecture)
    moved = CodesMoved()
    write_in_codes(base, config, recoding, updates, destination, progress, rounding=rounding, moved=moved)
    made = written(manifest, recoding)
    return replace(made, facts={**made.facts, **moved.facts(rounding)}, remarks=(*made.remarks, moved.sentence()))


def write_base_in_codes(base: Base, config: Config, code: str, destination: Store) -> None:
    """Write the base alone, with nothing learnt, in the code of this name."""
    plain = as_plain(base)
    quiet = ExportProgress(lambda done, total: None, lambda sentence: None)
    write_in_codes(
        plain, config, choose(plain, GRIDS[code]), {}, destination, quiet, rounding="nearest", moved=CodesMoved()
    )


def write_in_codes(
    base: Base,
    config: Config,
    recoding: Recoding,
    updates: Mapping[str, WeightUpdate],
    destination: Store,
    progress: ExportProgress,
    *,
    rounding: Rounding,
    moved: CodesMoved,
) -> None:
    """Write all files but the card."""
    weights, grid = find_all_weights(base), recoding.code
    assert isinstance(grid, Grid)
    for name, update in updates.items():
        if stored := recoding.stored.get(name):
            by = OfPart(name, 0, recoding.chosen[stored], update, rounding)
            recoding.encoders[stored] = replace(grid, by=by, seen=moved.add)
    if grid.second is not None:
        seconds = _seconds(weights, recoding)
        for name, stored in recoding.stored.items():
            encoder = recoding.encoders.get(stored, grid)
            assert isinstance(encoder, Grid)
            recoding.encoders[stored] = replace(encoder, second_number=seconds[name])

    def changes_of(base: Base, name: str, source: Weight, update: WeightUpdate, more: int) -> Iterable[Change]:
        return () if name in recoding.stored else changes_of_values(base, name, source, update, more)

    changed = files_with(base, weights, updates, changes_of)
    write_recoded(base, config, changed, recoding, destination, progress)


def _seconds(weights: FoundWeights, recoding: Recoding) -> dict[str, float]:
    """Return the second scale of each linear layer, by the name of its weight. All weights are read for that.

    The layers of one module, such as all projections of an attention, have the same one: servers compute some of them
    as one matrix, for which they take one scale.
    """
    largest = dict[str, float]()
    for name in recoding.stored:
        source = weights.sources[name]
        assert isinstance(source, TensorSource)
        module = _module_of(name)
        for begin, end in cut(source, 0, numel(source), source.shape[-1]):
            values = as_tensor(source.read(begin, end), source)
            largest[module] = max(largest.get(module, 0.0), float(values.abs().max()))
    return {name: second_of_nvfp4(largest[_module_of(name)]) for name in recoding.stored}


def _module_of(name: str) -> str:
    """The module that has the linear layer whose weight this is."""
    return name.rsplit(".", 2)[0]
