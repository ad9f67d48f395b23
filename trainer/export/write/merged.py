"""The trained model as an ordinary one, written file by file. Neither it nor the base is ever whole in memory.

Each file has the name, the header and the length of the base's own file. So its tensors keep their names, types and
places; only the bytes of weights that have changed differ.

An adapter is merged into the base's weights as they are stored, not as they were quantized for training. The merge is
in fp32 and rounded once to the stored type. If the base itself has learnt, the trained weights replace the base's, as
the forward pass of the training had them. If the base is stored in fewer bits, the merge uses the plain base that it
stands for (trainer/export/write/decoded.py), and the merged model has 16 bits.

If tokens were added that the base has no rows for, its embedding and head have more rows here. Then the header of their
file, and everything after them in that file, is written anew. config.json is written last: nothing loads a model
without it, so a killed merge is not mistaken for a whole one.
"""

import json
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from trainer.base.base import Base
from trainer.base.describe.language_model import composite_class
from trainer.base.find.locate import describe_base
from trainer.base.find.small_files import PROCESSOR_FILES, TOKENIZER_PATTERNS, named_files, seen_files
from trainer.base.find.tokenizer import tokenizer_files, with_special_tokens
from trainer.base.load.front import weights_beside
from trainer.base.load.load import DTYPES
from trainer.base.partitions.filling import as_tensor
from trainer.base.partitions.reading import PIECE_BYTES, PIECES_IN_FLIGHT, cut, freed_memory_given_back, read_ahead
from trainer.base.rows.conversion import Transposed
from trainer.base.rows.packed_parts import Weight
from trainer.base.rows.parameters import FoundWeights, find_all_weights
from trainer.config import Config
from trainer.data.render.chat_template import template_text
from trainer.errors import ConfigError
from trainer.export.card import CardContent, model_card, model_usage, sees
from trainer.export.destination import CARD, TRAINED, BytesWritten, check_destination
from trainer.export.trained import TrainedCheckpoint, check_mergeable_run, resolve_trained_base, trained_checkpoint
from trainer.export.write.decoded import as_plain
from trainer.model.towers import seeing_name
from trainer.state.checkpoint.learnt_weights import LearntWeights
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.safetensors_index import (
    INDEX_FILE,
    SINGLE_FILE,
    Joined,
    TensorSource,
    header_bytes,
    item_bytes,
    numel,
)
from trainer.store.store import Store
from trainer.tuning.method import WeightUpdate, method_of

_CONFIG = "config.json"
_SMALL_FILES = ("generation_config.json",)
OURS = ("*.safetensors", INDEX_FILE, *_SMALL_FILES, *TOKENIZER_PATTERNS, *PROCESSOR_FILES)
"""The files of a model but for the last one, as patterns."""


def export_merged(
    folder: Store, destination: Store, step: int | None = None, report: BytesWritten = lambda done, total: None
) -> CheckpointManifest:
    """Write the model of `step`, or of the newest whole checkpoint, to `destination`.

    Returns the checkpoint's manifest.

    Raises:
        NothingToResume: the run has no such checkpoint.
        StorageError: it is damaged, or a store fails.
        ConfigError: `destination` holds something other than a half export, or the base cannot be merged into, is not
            here, or is another than the run's.
    """
    manifest, config, _ = checkpoint_of_model(folder, destination, step)
    write_model(folder, manifest, config, destination, report)
    return manifest


def checkpoint_of_model(folder: Store, destination: Store, step: int | None) -> TrainedCheckpoint:
    """Return the checkpoint of `step`, or the newest whole one, for a model at `destination`.

    Raises as `export_merged`, except for the base.
    """
    check_destination(destination, *OURS)
    return trained_checkpoint(folder, step)


def write_model(
    folder: Store, manifest: CheckpointManifest, config: Config, destination: Store, report: BytesWritten
) -> None:
    """Write the whole model of a checkpoint.

    Raises `ConfigError` as `check_mergeable_run`, and if its base is not here or is not the run's.
    """
    check_mergeable_run(config, describe_base(config.model))
    base = as_plain(resolve_trained_base(folder, config.model, manifest))
    content = CardContent(
        "transformers",
        _description(config),
        "finetune",
        model_usage(composite_class(base.directory), sees=sees(folder, config, manifest)),
    )
    destination.put(CARD, model_card(folder, config, manifest, content))
    write_files(base, config, changed_files(folder, manifest, config, base), destination, report)


def write_files(
    base: Base, config: Config, changed: Sequence["ChangedFile"], destination: Store, report: BytesWritten
) -> None:
    """Write the base with these files of weights in the place of its own."""
    total, done = sum(file.size for file in changed), 0
    with freed_memory_given_back():
        for file in changed:
            destination.put_chunks(file.key, file.chunks(lambda n, at=done: report(at + n, total)), file.size)
            done += file.size
    tensors = base.tensors
    more = sum(file.more_bytes for file in changed)
    stored = sum(numel(source) * item_bytes(source) for source in tensors.values())
    put_index(destination, {name: source.key for name, source in tensors.items()}, stored + more)
    complete_model(base, config, destination, merged_config(base, changed))


def complete_model(base: Base, config: Config, destination: Store, settings: bytes) -> None:
    """Write the files that a model has beside its weights. `settings`, its config.json, comes last."""
    tokenizer = tokenizer_files(base.directory, config.model, template_text(config.data))
    small = named_files(base.directory, _SMALL_FILES)
    told = {name: with_special_tokens(content, base.directory, config.model) for name, content in small.items()}
    for name, content in {**told, **seen_files(base.directory, config), **tokenizer}.items():
        destination.put(name, content)
    destination.create(_CONFIG, with_special_tokens(settings, base.directory, config.model))


def _description(config: Config) -> str:
    if method_of(config).exports_model:
        return f"A model {TRAINED}: its base's own weights were fine-tuned, so there is no adapter to merge."
    over = f" The adapter was trained over the base {config.quant.held.in_words}." if config.quant.held.packs else ""
    return f"A model {TRAINED} by {config.tuning.method}: the adapter is merged into the weights of its base.{over}"


@dataclass(frozen=True)
class Change:
    """An update of `numel` elements of a stored tensor, beginning at the tensor's element `first`.

    They are the elements of the updated parameter from `begin` on. The tensor has `more` rows in the new file.
    """

    source: TensorSource
    first: int
    numel: int
    update: WeightUpdate
    begin: int
    more: int = 0

    @property
    def position(self) -> int:
        """The position of the first byte in the file."""
        return self.source.byte_range(self.first, self.first)[0]

    @property
    def more_bytes(self) -> int:
        return self.more * self.update.shape[-1] * item_bytes(self.source)


@dataclass(frozen=True)
class ChangedFile:
    """A file of the base with the trained weights in it.

    The base's own file has `old_size` bytes. If tensors have more rows now, the bytes `header` replace the first
    `old_header` of them.
    """

    store: Store
    key: str
    old_size: int
    changes: list[Change]
    header: bytes = b""
    old_header: int = 0

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.old_size + self.more_bytes + len(self.header) - self.old_header

    @property
    def more_bytes(self) -> int:
        """The bytes of the rows that the base does not have."""
        return sum(change.more_bytes for change in self.changes)

    def new_header(self) -> bytes:
        """Return the bytes before the data: the length of the JSON, and the JSON."""
        return self.header or _old_header(self.store, self.key)

    def chunks(self, report: Callable[[int], None] = lambda done: None) -> Iterator[bytearray]:
        """Yield the file's bytes in order. Threads read and change pieces some way ahead of the consumer."""
        pool, done = ThreadPoolExecutor(PIECES_IN_FLIGHT, thread_name_prefix="merge"), 0
        try:
            for _, data in read_ahead(pool, self._pieces()):
                yield data
                done += len(data)
                report(done)
        finally:
            # If the upload has failed, nobody needs the pieces that are still being read.
            pool.shutdown(wait=False, cancel_futures=True)

    def _pieces(self) -> Iterator["_Piece"]:
        """Yield whole rows of changed weights, and the bytes between them, header included, as they are."""

        read = partial(self.store.get_range, self.key)

        def copied(begin: int, end: int) -> Iterator[_Piece]:
            for first in range(begin, end, PIECE_BYTES):
                yield _Piece(partial(read, first, min(end, first + PIECE_BYTES)))

        position = self.old_header
        if self.header:
            yield _Piece(partial(bytearray, self.header))
        for change in sorted(self.changes, key=lambda change: change.position):
            source, columns, last = change.source, change.update.shape[-1], change.first + change.numel
            yield from copied(position, change.position)
            for begin, end in cut(source, change.first, last, multiple=columns):
                row = (change.begin + begin - change.first) // columns
                yield _Piece(partial(read, *source.byte_range(begin, end)), partial(_apply, source, change.update, row))
            _, position = source.byte_range(change.first, last)
            if change.more:
                new = partial(bytearray, change.more_bytes)
                yield _Piece(new, partial(_apply, source, change.update, source.shape[0]))
        yield from copied(position, self.old_size)


def changed_files(
    folder: Store, manifest: CheckpointManifest, config: Config, base: Base, changes_of: "ChangesOf | None" = None
) -> list[ChangedFile]:
    """Return the base's files of weights as they are after the training. This reads no weight yet."""
    learnt = LearntWeights(folder, manifest, DTYPES[config.model.dtype])
    updates = method_of(config).updates(learnt, base.architecture)
    return files_with(base, find_all_weights(base), updates, changes_of)


def files_with(
    base: Base, weights: FoundWeights, updates: Mapping[str, WeightUpdate], changes_of: "ChangesOf | None" = None
) -> list[ChangedFile]:
    """Return the base's files of weights, which are found there, with these updates of parameters.

    `changes_of` is `changes_of_values` unless weights in codes are to stay in codes.
    """
    shapes = {parameter.name: parameter.shape for parameter in base.architecture.parameters}
    sees = weights_beside(base) if any(name.startswith(seeing_name("")) for name in updates) else {}
    sources = {**weights.sources, **{seeing_name(name): source for name, source in sees.items()}}
    by_file = defaultdict[str, list[Change]](list)  # a mixture has tens of thousands of changes
    for name, update in updates.items():
        more = update.shape[0] - shapes.get(name, update.shape)[0]
        for source in (sources[name], *weights.copies.get(name, ())):
            for change in (changes_of or changes_of_values)(base, name, source, update, more):
                by_file[change.source.key].append(change)
    files = {source.key for source in base.tensors.values()}
    return [_changed_file(base, key, size, by_file[key]) for key, size, _ in base.versions if key in files]


def changes_of_values(base: Base, name: str, source: Weight, update: WeightUpdate, more: int) -> Iterator[Change]:
    """Yield the changes of the stored tensors that the parameter `name` is made of.

    Raises:
        ConfigError: its values are not stored row by row, or it has `more` rows now and is only a part of a stored
            tensor.
    """
    if isinstance(source, TensorSource):
        yield Change(source, 0, numel(source), update, 0, more)
        return
    if isinstance(source, Transposed):
        yield Change(source.transpose, 0, numel(source), _OfTheTranspose(update), 0)
        return
    if not isinstance(source, Joined) or more:
        raise ConfigError(
            f"there is no merged model: {base.name} stores {name} in another layout than the model has it in. Take"
            " --format peft: PEFT and vLLM load the adapter beside the base."
        )
    for stretch, start in zip(source.stretches, source.starts, strict=True):
        part = source.parts[stretch.part]
        assert isinstance(part, TensorSource)
        yield Change(part, stretch.begin, stretch.numel, update, start)


ChangesOf = Callable[[Base, str, Weight, WeightUpdate, int], Iterable[Change]]


@dataclass(frozen=True)
class _OfTheTranspose:
    """An update for files that hold the transpose of the weight.

    The whole weight counts as one row, because a row of the update is no row of the transpose.
    """

    update: WeightUpdate

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, prod(self.update.shape)

    def apply_to(self, rows: Tensor, first: int) -> None:
        stored = rows.view(self.update.shape[::-1])
        weight = stored.t().contiguous()
        self.update.apply_to(weight.view(-1), first)
        stored.copy_(weight.t())


def _changed_file(base: Base, key: str, size: int, changes: list[Change]) -> ChangedFile:
    """Make a changed file. It has a header of the new shapes and places if these differ from the base's."""
    grown = {change.source.offset: change for change in changes if change.more}
    if not grown:
        return ChangedFile(base.store, key, size, changes)
    old = _old_header(base.store, key)
    header: dict[str, Any] = json.loads(old[8:])
    tensors, shift = (entry for name, entry in header.items() if name != "__metadata__"), 0
    for tensor in sorted(tensors, key=lambda tensor: tensor["data_offsets"]):
        begin, end = tensor["data_offsets"]
        change = grown.get(len(old) + begin) if end > begin else None
        more = 0
        if change is not None:
            more, tensor["shape"][0] = change.more_bytes, tensor["shape"][0] + change.more
        tensor["data_offsets"] = [begin + shift, end + shift + more]
        shift += more
    return ChangedFile(base.store, key, size, changes, header_bytes(header), len(old))


def _old_header(store: Store, key: str) -> bytes:
    """Read the bytes before the data in a file of the base."""
    (length,) = struct.unpack("<Q", store.get_range(key, 0, 8))
    return bytes(store.get_range(key, 0, 8 + length))


def merged_config(base: Base, changed: Sequence[ChangedFile]) -> bytes:
    """Return config.json, which says how many rows the embedding has."""
    content = (base.directory / _CONFIG).read_bytes()
    more = max((change.more for file in changed for change in file.changes), default=0)
    if more == 0:
        return content
    settings = json.loads(content)
    language = settings.get("text_config", settings)  # a part of the settings of a model that also sees or hears
    language["vocab_size"] = base.architecture.vocabulary + more
    return json.dumps(settings, indent=2).encode()


def put_index(destination: Store, weight_map: Mapping[str, str], size: int) -> None:
    """Write which file each tensor is in, if there are several files. Their tensors have so many bytes in all."""
    if {*weight_map.values()} != {SINGLE_FILE}:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        destination.put(INDEX_FILE, json.dumps(index, indent=2).encode())


@dataclass(frozen=True)
class _Piece:
    """Some bytes of a new file: those of the base or others, and how they change."""

    content: Callable[[], bytearray]
    change: Callable[[bytearray], None] = lambda data: None

    def read(self) -> bytearray:
        data = self.content()
        self.change(data)
        return data


def _apply(source: TensorSource, update: WeightUpdate, first: int, data: bytearray) -> None:
    update.apply_to(as_tensor(data, source), first)
