"""The trained model as an ordinary one, file by file: it is never whole in memory, nor is the base on this machine.

Each file has the name, the header and the length of the base's own, so its tensors keep their names, types and places;
only the bytes of weights that have changed differ. An adapter is merged into the base's weights as they are stored, not as
they were quantized for training, in fp32, and rounded once to the type they are stored in. A base that has learnt itself has
the trained weights in the place of its own, as the forward pass of the training had them.
config.json is written last: nothing loads a model without it, so a merge that was killed is not mistaken for one.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from trainer.base.filling import as_tensor
from trainer.base.load import DTYPES
from trainer.base.locate import TOKENIZER_FILES, Base, check_mergeable, describe_base, named_files
from trainer.base.parameters import stored_parts
from trainer.base.reading import PIECE_BYTES, PIECES_IN_FLIGHT, cut, freed_memory_given_back, read_ahead
from trainer.checkpoint.manifest import CheckpointManifest, whole_checkpoint
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.export.command import BytesWritten, command, print_progress
from trainer.export.folder import CARD, TRAINED, check_destination, model_card
from trainer.export.learnt import CheckpointWeights
from trainer.export.proof import Proof
from trainer.export.trained import resolve_trained_base, trained_config, trained_method
from trainer.safetensors_index import INDEX_FILE, SINGLE_FILE, TensorSource, numel
from trainer.store import Store
from trainer.tuning.method import WeightUpdate, find_method

_CONFIG = "config.json"
_SMALL_FILES = ("generation_config.json", *TOKENIZER_FILES)


def export_merged(
    run: Store, destination: Store, step: int | None = None, report: BytesWritten = lambda done, total: None
) -> CheckpointManifest:
    """Write the model of `step`, or of the newest whole checkpoint, to `destination`; returns its manifest.

    Raises:
        NothingToResume: the run has no such checkpoint.
        StorageError: it is damaged, or a store fails.
        ConfigError: `destination` holds something that is no half export, or the base cannot be merged into, is not here,
            or is another than the run's.
    """
    check_destination(destination, "*.safetensors", INDEX_FILE, *_SMALL_FILES)
    manifest = whole_checkpoint(run, step)
    config = trained_config(run, manifest)
    method = trained_method(config, manifest)
    if not method.exports_model:
        check_mergeable(config.model, describe_base(config.model))
    if method.unmergeable:
        raise ConfigError(f"--merge: {method.unmergeable}. Leave out --merge.")
    write_model(run, manifest, config, destination, report)
    return manifest


def write_model(
    run: Store, manifest: CheckpointManifest, config: Config, destination: Store, report: BytesWritten
) -> None:
    """Write the whole model of a checkpoint of a mergeable method. Raises `ConfigError` when its base is not here, is another
    than the run's, or was cut to its first layers."""
    if config.model.layers:
        raise ConfigError(
            f"model.layers: the run has the first {config.model.layers} layers of its base only, and the files of a model have "
            "all. Only a run of the whole base can be exported as a model."
        )
    base = resolve_trained_base(config.model, manifest)
    destination.put(CARD, model_card(config, manifest, "transformers", _description(config)))
    changed = changed_files(run, manifest, config, base)
    total, done = sum(file.size for file in changed), 0
    with freed_memory_given_back():
        for file in changed:
            destination.put_chunks(file.key, file.chunks(lambda n, at=done: report(at + n, total)), file.size)
            done += file.size
    if {file.key for file in changed} != {SINGLE_FILE}:
        destination.put(INDEX_FILE, _index(base))
    for name, content in named_files(base.directory, _SMALL_FILES).items():
        destination.put(name, content)
    destination.create(_CONFIG, (base.directory / _CONFIG).read_bytes())


def _description(config: Config) -> str:
    if find_method(config.tuning).exports_model:
        return f"A model {TRAINED}: its base's own weights were fine-tuned, so there is no adapter to merge."
    over = "" if config.quant.type == "none" else f" The adapter was trained over the base in {config.quant.type}."
    return f"A model {TRAINED} by {config.tuning.method}: the adapter is merged into the weights of its base.{over}"


@dataclass(frozen=True)
class _Change:
    """An update of one stored tensor, which holds the updated parameter from its element `begin` on."""

    source: TensorSource
    update: WeightUpdate
    begin: int


@dataclass(frozen=True)
class ChangedFile:
    """A file of the base with the trained weights in it; `size` in bytes."""

    store: Store
    key: str
    size: int
    changes: list[_Change]

    def chunks(self, report: Callable[[int], None] = lambda done: None) -> Iterator[bytearray]:
        """Its bytes in order. Pieces are read and changed on threads of their own, some ahead of whoever takes them."""
        pool, done = ThreadPoolExecutor(PIECES_IN_FLIGHT, thread_name_prefix="merge"), 0
        try:
            for _, data in read_ahead(pool, self._pieces()):
                yield data
                done += len(data)
                report(done)
        finally:
            # Where the upload has failed, nobody wants what is still being read.
            pool.shutdown(wait=False, cancel_futures=True)

    def _pieces(self) -> Iterator["_FileRange"]:
        """Whole rows of changed weights, and what lies between these, header included, as it is."""

        def copied(begin: int, end: int) -> Iterator[_FileRange]:
            for first in range(begin, end, PIECE_BYTES):
                yield _FileRange(self.store, self.key, first, min(end, first + PIECE_BYTES))

        position = 0
        for change in sorted(self.changes, key=lambda change: change.source.offset):
            source, columns = change.source, change.update.shape[-1]
            yield from copied(position, source.offset)
            for begin, end in cut(source, 0, numel(source), multiple=columns):
                row = (change.begin + begin) // columns
                yield _FileRange(
                    self.store, self.key, *source.byte_range(begin, end), partial(_apply, source, change.update, row)
                )
            _, position = source.byte_range(0, numel(source))
        yield from copied(position, self.size)


def changed_files(run: Store, manifest: CheckpointManifest, config: Config, base: Base) -> list[ChangedFile]:
    """The base's files of weights as they are after the training; nothing is read yet."""
    learnt = CheckpointWeights(run, manifest, DTYPES[config.model.dtype])
    changes = [
        _Change(source, update, begin)
        for name, update in find_method(config.tuning).updates(learnt, base.architecture).items()
        for source, begin in stored_parts(base, name, update.shape)
    ]
    files = {source.key for source in base.tensors.values()}
    return [
        ChangedFile(base.store, key, size, [change for change in changes if change.source.key == key])
        for key, size, _ in base.versions
        if key in files
    ]


def _index(base: Base) -> bytes:
    """The index of several files of weights."""
    weight_map = {name: source.key for name, source in sorted(base.tensors.items())}
    bytes_of_tensors = sum(end - begin for begin, end in (s.byte_range(0, numel(s)) for s in base.tensors.values()))
    return json.dumps({"metadata": {"total_size": bytes_of_tensors}, "weight_map": weight_map}, indent=2).encode()


@dataclass(frozen=True)
class _FileRange:
    """Bytes [begin, end) of a file of the base, and how they change."""

    store: Store
    key: str
    begin: int
    end: int
    change: Callable[[bytearray], None] = lambda data: None

    def read(self) -> bytearray:
        data = self.store.get_range(self.key, self.begin, self.end)
        self.change(data)
        return data


def _apply(source: TensorSource, update: WeightUpdate, first: int, data: bytearray) -> None:
    update.apply_to(as_tensor(data, source), first)


def _prove(run: Store, step: int, merged: Store) -> Proof:
    from trainer.export.verify import prove_merged

    return prove_merged(run, step, merged)


if __name__ == "__main__":
    command(partial(export_merged, report=print_progress()), _prove)
