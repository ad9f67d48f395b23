"""Base and adapter as one ordinary model, file by file: the model is never whole in memory, nor the base on this machine.

Each file has the name, the header and the length of the base's own, so its tensors keep their names, types and places;
only the bytes of adapted weights differ. These are the base's weights as they are stored, not as they were quantized for
training, changed as the run's method says, in fp32, and rounded once to the type they are stored in.
config.json is written last: nothing loads a model without it, so a merge that was killed is not mistaken for one.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from trainer.base.filling import as_tensor
from trainer.base.locate import TOKENIZER_FILES, Base, check_mergeable, describe_base, named_files
from trainer.base.parameters import find_source
from trainer.base.reading import PIECE_BYTES, PIECES_IN_FLIGHT, cut, freed_memory_given_back, read_ahead
from trainer.checkpoint.manifest import CheckpointManifest, whole_checkpoint
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.export.adapter import adapter_weights
from trainer.export.command import command
from trainer.export.folder import CARD, TRAINED, check_destination, model_card
from trainer.export.proof import Proof
from trainer.export.trained import resolve_trained_base, trained_config
from trainer.safetensors_index import INDEX_FILE, SINGLE_FILE, TensorSource, numel
from trainer.store import Store
from trainer.tuning.method import WeightUpdate, find_method

_CONFIG = "config.json"
_SMALL_FILES = ("generation_config.json", *TOKENIZER_FILES)
# Told how many bytes are written, and how many there are in all.
BytesWritten = Callable[[int, int], None]


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
    check_mergeable(config.model, describe_base(config.model))
    method = find_method(config.tuning)
    if method.unmergeable:
        raise ConfigError(f"--merge: {method.unmergeable}. Leave out --merge.")
    base = resolve_trained_base(config.model, manifest)
    updates = method.updates(adapter_weights(run, manifest, config), base.architecture)
    card = model_card(config, manifest, "transformers", _description(config))
    destination.put(CARD, card)
    _write_weights(base, updates, destination, report)
    for name, content in named_files(base.directory, _SMALL_FILES).items():
        destination.put(name, content)
    destination.create(_CONFIG, (base.directory / _CONFIG).read_bytes())
    return manifest


def _description(config: Config) -> str:
    over = "" if config.quant.type == "none" else f" The adapter was trained over the base in {config.quant.type}."
    return f"A model {TRAINED} by {config.tuning.method}: the adapter is merged into the weights of its base.{over}"


@freed_memory_given_back()
def _write_weights(base: Base, updates: Mapping[str, WeightUpdate], destination: Store, report: BytesWritten) -> None:
    """The files of weights, and their index where there are several."""
    adapted = [(_stored(base, name, update.shape), update) for name, update in updates.items()]
    files = {source.key for source in base.tensors.values()}
    sizes = {key: size for key, size, _ in base.versions if key in files}
    done, total = 0, sum(sizes.values())
    for key, size in sizes.items():
        inside = [(source, update) for source, update in adapted if source.key == key]
        destination.put_chunks(
            key, _merged_bytes(base.store, key, size, inside, lambda n, at=done: report(at + n, total)), size
        )
        done += size
    if files != {SINGLE_FILE}:
        weight_map = {name: source.key for name, source in sorted(base.tensors.items())}
        bytes_of_tensors = sum(end - begin for begin, end in (s.byte_range(0, numel(s)) for s in base.tensors.values()))
        index = {"metadata": {"total_size": bytes_of_tensors}, "weight_map": weight_map}
        destination.put(INDEX_FILE, json.dumps(index, indent=2).encode())


def _stored(base: Base, name: str, shape: tuple[int, ...]) -> TensorSource:
    source = find_source(base, name, shape)
    assert isinstance(source, TensorSource), "only experts are stored in parts, and they have no adapters"
    return source


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


def _merged_bytes(
    store: Store,
    key: str,
    size: int,
    adapted: list[tuple[TensorSource, WeightUpdate]],
    report: Callable[[int], None],
) -> Iterator[bytearray]:
    """One file, piece by piece. Pieces are read and merged on threads of their own, some ahead of the upload."""
    pool, done = ThreadPoolExecutor(PIECES_IN_FLIGHT, thread_name_prefix="merge"), 0
    try:
        for _, data in read_ahead(pool, _pieces(store, key, size, adapted)):
            yield data
            done += len(data)
            report(done)
    finally:
        # Where the upload has failed, nobody wants what is still being read.
        pool.shutdown(wait=False, cancel_futures=True)


def _pieces(
    store: Store, key: str, size: int, adapted: list[tuple[TensorSource, WeightUpdate]]
) -> Iterator[_FileRange]:
    """The whole file, in order: whole rows of adapted weights, and what lies between these, header included, as it is."""

    def copied(begin: int, end: int) -> Iterator[_FileRange]:
        for first in range(begin, end, PIECE_BYTES):
            yield _FileRange(store, key, first, min(end, first + PIECE_BYTES))

    position = 0
    for source, update in sorted(adapted, key=lambda pair: pair[0].offset):
        yield from copied(position, source.offset)
        columns = update.shape[-1]
        for begin, end in cut(source, 0, numel(source), multiple=columns):
            yield _FileRange(
                store, key, *source.byte_range(begin, end), partial(_add, source, update, begin // columns)
            )
        _, position = source.byte_range(0, numel(source))
    yield from copied(position, size)


def _add(source: TensorSource, update: WeightUpdate, first: int, data: bytearray) -> None:
    update.apply_to(as_tensor(data, source), first)


def _prove(run: Store, step: int, merged: Store) -> Proof:
    from trainer.export.verify import prove_merged

    return prove_merged(run, step, merged)


def _print_progress() -> BytesWritten:
    """Lines for whoever started this process: "progress", bytes done, bytes in all."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2 or done == total:
            last = time.monotonic()
            print("progress", done, total, flush=True)

    return report


if __name__ == "__main__":
    command(partial(export_merged, report=_print_progress()), _prove)
