"""The trained model with its linear layers in fewer bits, written file by file.

Neither the model nor its base is ever whole in memory.

Each file is the one of a merge (trainer/export/write/merged.py), read as a stream. Its tensors come in the order of
their places. Those to be quantized go through a code some rows at a time, and all others pass as they are. Sizes are
known before, so the new header goes first.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.base.base import Base
from trainer.base.describe.language_model import composite_class
from trainer.base.find.locate import describe_base
from trainer.base.partitions.filling import SOURCE_DTYPES
from trainer.base.partitions.reading import PIECE_BYTES, freed_memory_given_back
from trainer.base.rows.parameters import FoundWeights, find_all_weights
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.export.card import CardContent, model_card, model_usage
from trainer.export.destination import CARD, TRAINED, ExportProgress, Written
from trainer.export.trained import check_mergeable_run, check_recodable, resolve_trained_base, unloadable
from trainer.export.write.decoded import as_plain
from trainer.export.write.merged import (
    ChangedFile,
    changed_files,
    checkpoint_of_model,
    complete_model,
    merged_config,
    put_index,
)
from trainer.model.held import Encoder, NewTensor, WeightError
from trainer.servers import computed_with
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.safetensors_index import DTYPE_BYTES, TensorSource, header_of
from trainer.store.store import Store


@dataclass
class Recoding:
    """A `code`, and the names of the stored tensors that it applies to, which are the weights of linear layers.

    `stored` has these names by those of the parameters. `encoders` has those that encode one tensor of these alone,
    because they know how it changes.
    """

    code: Encoder
    chosen: Mapping[str, tuple[int, int]]
    stored: Mapping[str, str]
    untouched: list[str]
    error: WeightError = field(default_factory=WeightError)
    encoders: dict[str, Encoder] = field(default_factory=dict)


def export_recoded(
    folder: Store, destination: Store, step: int | None, make: Callable[[Config], Encoder], progress: ExportProgress
) -> Written:
    """Write the merged model of `step`, or of the newest whole checkpoint, in the code that `make` makes for the run.

    Raises as `ExportFormat.write`.
    """
    manifest, config, _ = checkpoint_of_model(folder, destination, step)
    check_mergeable_run(config, describe_base(config.model))
    base, code = as_plain(resolve_trained_base(folder, config.model, manifest)), make(config)
    recoding = choose(base, code)
    what = f"A model {TRAINED}, base and adapter merged, its linear layers quantized to {code.name} after that."
    usage = model_usage(composite_class(base.directory))
    destination.put(CARD, model_card(folder, config, manifest, CardContent("transformers", what, "quantized", usage)))
    write_recoded(base, config, changed_files(folder, manifest, config, base), recoding, destination, progress)
    return written(manifest, recoding)


def choose(base: Base, code: Encoder, weights: FoundWeights | None = None) -> Recoding:
    """Return the `code`, with the stored tensors that it quantizes. `weights` are those of the base, if they are known.

    These are matrices of linear layers that the files hold as the model has them. Layers that servers compute as one
    matrix are quantized together or not at all: vLLM refuses a model in which only some are.

    Raises `ConfigError` for models whose layers transformers cannot have in this code.
    """
    check_recodable(base.description, code.name)
    if "text_config" in base.config:
        raise unloadable("a model that also sees or hears", code.name)
    names = {(source.key, source.offset): name for name, source in base.tensors.items()}
    sources = (weights or find_all_weights(base)).sources
    chosen, untouched = dict[str, tuple[int, int]](), list[str]()
    stored = dict[str, str]()
    linear = [parameter for parameter in base.architecture.parameters if parameter.kind in ("linear", "head")]
    suiting = {
        parameter.name: source
        for parameter in linear
        if parameter.kind == "linear" and code.takes((parameter.shape[0], parameter.shape[1]))
        if isinstance(source := sources.get(parameter.name), TensorSource) and source.dtype in ("BF16", "F16", "F32")
    }
    every = {parameter.name for parameter in linear}
    for parameter in linear:
        source = suiting.get(parameter.name)
        if source is None or any(beside in every - suiting.keys() for beside in computed_with(parameter.name)):
            untouched.append(parameter.name.removesuffix(".weight"))
        else:
            stored[parameter.name] = name = names[source.key, source.offset]
            chosen[name] = parameter.shape[0], parameter.shape[1]
    if not chosen:
        raise ConfigError(
            f"--format {code.name}: no linear layer of this base can be stored in this form. Take --format merged."
        )
    return Recoding(code, chosen, stored, untouched)


def write_recoded(
    base: Base,
    config: Config,
    changed: Sequence[ChangedFile],
    recoding: Recoding,
    destination: Store,
    progress: ExportProgress,
) -> None:
    """Write all files but the card."""
    _write_weights(changed, recoding, destination, progress)
    settings = json.loads(merged_config(base, changed)) | {
        "quantization_config": recoding.code.configuration(recoding.untouched)
    }
    complete_model(base, config, destination, json.dumps(settings, indent=2).encode())


def _write_weights(
    changed: Sequence[ChangedFile], recoding: Recoding, destination: Store, progress: ExportProgress
) -> None:
    """Write the files of weights, and their index."""
    weight_map, total = dict[str, str](), 0
    read, in_all = 0, sum(file.size for file in changed)
    with freed_memory_given_back():
        for file in changed:
            merged_header = file.new_header()
            tensors = _tensors(merged_header)
            entries = list[NewTensor]()
            for tensor in tensors:
                shape = recoding.chosen.get(tensor.name)
                entries += [tensor] if shape is None else recoding.code.entries(tensor.name, shape)
            header = header_of(entries)
            weight_map |= {entry.name: file.key for entry in entries}
            size = sum(entry.size for entry in entries)
            chunks = file.chunks(lambda n, at=read: progress.written(at + n, in_all))
            merged = _Merged(chunks, len(merged_header))
            destination.put_chunks(file.key, _stream(header, tensors, merged, recoding), len(header) + size)
            total, read = total + size, read + file.size
    put_index(destination, weight_map, total)


def _tensors(header: bytes) -> list[NewTensor]:
    """Return the tensors of a file, in the order of their places."""
    found = json.loads(header[8:])
    found.pop("__metadata__", None)
    ordered = sorted(found.items(), key=lambda item: item[1]["data_offsets"])
    return [NewTensor(name, facts["dtype"], tuple(facts["shape"])) for name, facts in ordered]


def _stream(
    header: bytes, tensors: Sequence[NewTensor], merged: "_Merged", recoding: Recoding
) -> Iterator[bytes | bytearray]:
    """Yield the bytes of the new file, from those of the merged one."""
    yield header
    for tensor in tensors:
        shape = recoding.chosen.get(tensor.name)
        if shape is None:
            for first in range(0, tensor.size, PIECE_BYTES):
                yield merged.take(min(PIECE_BYTES, tensor.size - first))
        else:
            code = recoding.encoders.get(tensor.name, recoding.code)
            yield from code.encode(_pieces(merged, tensor, code), shape, recoding.error)


def _pieces(merged: "_Merged", tensor: NewTensor, code: Encoder) -> Iterator[Tensor]:
    rows, columns = tensor.shape
    item, unit = DTYPE_BYTES[tensor.dtype], code.at_once((rows, columns))
    step = max(1, PIECE_BYTES // item // unit) * unit * item
    for first in range(0, tensor.size, step):
        yield torch.frombuffer(merged.take(min(step, tensor.size - first)), dtype=SOURCE_DTYPES[tensor.dtype])


class _Merged:
    """Takes bytes in order out of pieces of any sizes. The bytes of the header, which come first, are skipped."""

    def __init__(self, chunks: Iterator[bytearray], header: int) -> None:
        self._chunks, self._left = chunks, memoryview(b"")
        self.take(header)

    def take(self, size: int) -> bytearray:
        taken = bytearray()
        while len(taken) < size:
            if not self._left:
                self._left = memoryview(next(self._chunks))
            part = self._left[: size - len(taken)]
            taken += part
            self._left = self._left[len(part) :]
        return taken


def written(manifest: CheckpointManifest, recoding: Recoding) -> Written:
    """Say how far the stored weights are from the merged ones, and which layers stay as they were."""
    code, error, untouched = recoding.code, recoding.error.relative, recoding.untouched
    remark = (
        f"{len(recoding.chosen)} matrices in {code.name}, whose weights are {error:.2%} off the merged ones (root of"
        " the mean square)."
    )
    stay = f" Linear layers that stay as they were stored: {', '.join(untouched)}." if untouched else ""
    facts = {"matrices": len(recoding.chosen), "weight_error": error, "untouched": untouched}
    return Written(manifest, facts, (remark + stay,))
