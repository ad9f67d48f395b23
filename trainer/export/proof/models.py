"""The models that a proof compares.

They are a checkpoint as it was trained, in our own loader, and its base and its export in transformers.
A base in fewer bits is compared by its decoded values. transformers decodes FP8 and MXFP4. Formats for which
transformers needs another package are decoded by our own reader.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from trainer.base.base import Base
from trainer.base.describe.description import parse_base_config, quantization_of
from trainer.base.describe.language_model import model_config
from trainer.base.find.locate import resolve_base
from trainer.base.find.small_files import CONFIG, copy_object, copy_weights, is_small_file
from trainer.base.find.tokenizer import find_rows
from trainer.base.load.load import DTYPES, empty_model
from trainer.base.partitions.filling import SOURCE_DTYPES, as_tensor
from trainer.base.rows.parameters import FoundWeights, find_all_weights
from trainer.base.stored.shared.coded import Coded
from trainer.config import Config, override
from trainer.config.row_kinds import ROW_KINDS
from trainer.export.destination import print_sentence
from trainer.export.proof import plain
from trainer.export.proof.rendering import check_rendering, source_rows, trained_texts
from trainer.export.proof.rows import ROWS, Probe, ProbeRow, as_shares, find_probe, judged
from trainer.export.proof.sides import FreeMemory, ProofSide, aside, exported_side, get_ready, trained_side
from trainer.export.proof.streamed import StreamedLayers
from trainer.export.trained import resolve_trained_base, trained_config
from trainer.model.held.layers import HeldWeights
from trainer.model.micro_batch import MicroBatch
from trainer.model.packed import PackedModel
from trainer.plan.assemble import ShardingPlan, assemble, attention_of
from trainer.plan.resolve import Resolved
from trainer.processes.accelerator import is_accelerator
from trainer.processes.devices import host_memory_left, local_gpus
from trainer.processes.ranks import join
from trainer.state.checkpoint.checkpoints import TrainablePartition, load_partitions
from trainer.state.checkpoint.manifest import CheckpointManifest, read_manifest
from trainer.state.optimizer import MASTER
from trainer.state.zero.engine import Engine
from trainer.state.zero.policy import build_deepspeed_config
from trainer.store.safetensors_index import WEIGHT_DTYPES, PackedTensor, numel
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_store
from trainer.tuning.head import WithHead, head_of, outputs
from trainer.tuning.method import Method, method_of
from trainer.tuning.objective.sft import NextTokens

T = TypeVar("T")
# With this policy our engine has a layer's weights on the GPU only for the layer's turn.
_A_LAYER_AT_A_TIME = "zero3_offload_cpu"


@dataclass(frozen=True)
class Trained:
    """The exported checkpoint, as it was trained.

    `scratch` is a folder for a side that computes one layer at a time. `rows` is the most rows to compare on.
    """

    run: Store
    manifest: CheckpointManifest
    config: Config
    base: Base
    scratch: Path | None = None
    rows: int = ROWS

    @classmethod
    def at(cls, folder: Store, step: int, scratch: Path | None = None, rows: int = ROWS) -> "Trained":
        manifest = read_manifest(folder, step)
        config = trained_config(folder, manifest)
        return cls(folder, manifest, config, resolve_trained_base(folder, config.model, manifest), scratch, rows)

    @cached_property
    def room(self) -> FreeMemory:
        """The memory of this machine that is free before either side is loaded."""
        return FreeMemory(aside("gpu", _free_gpu_memory) if local_gpus() else 0, host_memory_left())

    def side(self, computed_in: str) -> ProofSide:
        """Return the side of this checkpoint in our own loader."""
        learnt = sum(self.manifest.numels.values())
        return trained_side(self.base.architecture, self.config.quant, learnt, DTYPES[computed_in].itemsize)

    def predictions(self, *, learnt: bool = True) -> list[Tensor]:
        """Run `logits` in a process of its own. The side of the export comes next."""
        get_ready(__name__)
        return self._aside(self.side(self.computed_in), Trained.logits, self.computed_in, learnt)

    def exported(self, work: Callable[..., T], *arguments: Any, packed: bool, recoded: bool = False) -> T:
        """Run `work(self, *arguments)` in a process that has room for an exported model.

        transformers unpacks a whole model that is stored in fewer bits, such as a `recoded` one.
        """
        model, stored = self.base.architecture, self.base.stored
        held = max(held_in(self.base), self.dtype, key=lambda dtype: dtype.itemsize)
        refused = "what is stored in 4 or 8 bits is read whole" if recoded or stored.quantized or stored.decoded else ""
        refused = refused or ("rows with pictures need the whole class" if self.sees else "")
        side = exported_side(model, self.config.quant, held.itemsize, packed=packed, refused=refused)
        return self._aside(side, work, *arguments)

    def _aside(self, side: ProofSide, work: Callable[..., T], *arguments: Any) -> T:
        place = side.place(self.room)
        _say(side.sentence(self.room))
        step, rows = self.manifest.step, self.rows
        return aside(place.device, _with_trained, self.run.uri, step, rows, place.streamed, work, arguments)

    def streamed_layers(self) -> StreamedLayers | None:
        """Return the layers that are read at their turns. A class with another head, or that sees, is loaded whole."""
        is_whole = self.head is not None or self.sees
        return StreamedLayers(self.scratch) if self.scratch and not is_whole else None

    @property
    def sees(self) -> bool:
        """Whether its rows have pictures."""
        return ROW_KINDS[self.config.data.kind].sees

    @cached_property
    def method(self) -> Method:
        return method_of(self.config)

    @property
    def head(self) -> WithHead | None:
        return head_of(self.method)

    @cached_property
    def probe(self) -> Probe:
        return judged(find_probe(self.run, self.config, self.manifest, self.base, self.rows), self.head)

    @cached_property
    def weights(self) -> FoundWeights:
        return find_all_weights(self.base)

    @property
    def vocabulary(self) -> int:
        """The rows of the trained model's embedding, including those of added tokens."""
        return max(self.base.architecture.vocabulary, *(row + 1 for row, _ in find_rows(self.config.model)), 0)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.model.dtype]

    @cached_property
    def computed_in(self) -> str:
        exact = not self.base.stored.quantized and _fits_in_fp32(self)
        return "fp32" if exact else self.config.model.dtype

    def check_texts(self, destination: Store) -> None:
        """Raise `CapstanError` if the tokenizer or the template in `destination` is not the run's."""
        rows, sources = [row.tokens[0].tolist() for row in self.probe.rows], source_rows(self.config)
        where = (
            f"{len(sources)} rows of its sources" if sources else f"{self.probe.origin}, as its sources cannot be read"
        )
        _say(f"renders {where} through the exported tokenizer and chat template")
        with scratch_folder("verify") as folder:
            for entry in destination.list():
                if is_small_file(entry.key):
                    copy_object(destination, entry, Path(folder))
            check_rendering(trained_texts(self.config, self.base.directory), Path(folder), rows, sources)

    def logits(self, computed_in: str, learnt: bool = True) -> list[Tensor]:
        """Return for each row the logits (P, V) fp32, by our own sharded loader, engine and restore, as one rank.

        Without what was `learnt` they are those before the first step, over the base as it was quantized for the
        training.
        """
        ranks, base = join(), self.base
        # Settings that made the training faster only add rounding here, or need more than one rank.
        changes = [
            f"model.dtype={computed_in}",
            "model.attention=auto",
            "model.kernels=none",
            "train.products=plain",
            "quant.cache=false",
            "sharding.sequence_parallel=1",
        ]
        if self.scratch:
            changes.append(f"sharding.deepspeed={_A_LAYER_AT_A_TIME}")
        config = override(self.config, *changes)
        resolved = replace(Resolved.of(config, base), objective=NextTokens())
        attention = attention_of(resolved, ranks.device)
        on_gpu = is_accelerator(ranks.device)
        settings = build_deepspeed_config(config, world_size=ranks.world_size, accumulation=1, on_gpu=on_gpu)
        engine, _ = assemble(resolved, ranks, attention, ShardingPlan(settings, "world"))
        for module in engine.model.modules():
            if isinstance(module, HeldWeights):  # it computes in fp32 here with the values of the training
                module.unrounded = self.config.model.dtype == "fp32"
        plain.round_buffers(engine.model, dict(empty_model(base, self.config, attention).named_buffers()))
        if learnt:
            partitions = engine.partitions()
            load_partitions(self.run, self.manifest, partitions, states=(MASTER,))
            for part in partitions:  # the values that the forward passes of the training had, and that are exported
                part.states["master"].copy_(self._exported(part))
            engine.refresh(self.manifest.updates)
        if self.head is not None:
            return [_head_outputs(engine, row) for row in self.probe.rows]
        return [
            _seen_logits(engine, row)
            if row.pictures
            else engine.logits(row.tokens.to(ranks.device))[0, row.places.to(ranks.device)].float().cpu()
            for row in self.probe.rows
        ]

    def _exported(self, part: TrainablePartition) -> Tensor:
        values = part.states["master"].to(self.dtype)
        if not self.method.exports_model:
            return values
        return values.to(SOURCE_DTYPES[self.weights.sources[part.name].dtype])


def _head_outputs(engine: Engine, row: ProbeRow) -> Tensor:
    """Return the outputs of the head at the places of a row, (P, outputs) fp32 on the CPU, without dropout.

    Collective.
    """
    with engine.evaluating():
        found = engine.look(partial(outputs, places=row.places), MicroBatch.of_text(row.tokens, row.pictures))
    return as_shares(found.cpu(), row)


def _seen_logits(engine: Engine, row: ProbeRow) -> Tensor:
    """Return the logits (P, V) at the places of a row with pictures, fp32 on the CPU, without dropout. Collective."""
    seen = MicroBatch.of_text(row.tokens, row.pictures)
    with engine.evaluating():
        return engine.look(partial(_logits_at, places=row.places), seen).float().cpu()


def _logits_at(model: PackedModel, row: MicroBatch, places: Tensor) -> Tensor:
    return model.head(model.hidden(row.input)[0, places.to(row.labels.device)])


def plain_model(trained: Trained, folder: Path) -> Any:
    """Load the model in `folder`, of the base's kind, in transformers. One in codes is decoded here, because
    transformers needs another package for some codes, and cannot multiply by FP8 on a CPU.
    """
    held, streamed = held_in(trained.base), trained.streamed_layers()
    if quantization_of(parse_base_config(str(folder), (folder / CONFIG).read_bytes())):
        written = merged_base(trained, folder)
        if written.base.stored.decoded:
            return stored_base(written, folder, held_in(written.base), None).to(plain.device())
    return plain.load_plain(folder, held, trained.dtype, streamed=streamed).to(plain.device())


def plain_base(trained: Trained, folder: Path, computed_in: str, unpacked: tuple[str, ...] = ()) -> Any:
    """Load the base in transformers, quantized as for training. `unpacked` is as in `plain.quantize`."""
    config, dtype = trained.config, DTYPES[computed_in]
    # PEFT keeps a prefix in its base's type, so the prefix of a training in fp32 needs a base in fp32.
    exact = torch.float32 if config.model.dtype == "fp32" else held_in(trained.base)
    streamed = trained.streamed_layers()
    held = exact if computed_in == "fp32" else dtype
    in_codes = config.quant.held.packs and not config.quant.held.quantizes
    model = stored_base(trained, folder, held, streamed, unrounded=in_codes and config.model.dtype == "fp32")
    if config.quant.held.quantizes and not trained.base.stored.quantized:
        plain.quantize(model, config.quant, dtype, trained.base.architecture.quantizable(), unpacked, streamed)
    return plain.grow(model, trained.vocabulary).to(plain.device())


def stored_base(
    trained: Trained, folder: Path, held: torch.dtype, streamed: StreamedLayers | None, *, unrounded: bool = False
) -> Any:
    """Load the base in transformers as its files have it. A base in fewer than 16 bits is decoded.

    The products of codes and scales are rounded to the 16 bits of the format, unless they should stay `unrounded`, as
    a run in fp32 that holds codes computes with them.
    """
    base, architecture = trained.base, model_config(folder, trained.config.model.layers)
    made: Any = None
    if (head := trained.head) is not None:
        made, architecture.num_labels = getattr(transformers, head.head.transformers_class), head.outputs
    told = base.stored.decoded and base.stored.dequantizes
    values = decoded_here(base, unrounded=unrounded) if base.stored.decoded and not told else None
    with dequantized_by_transformers(architecture, unrounded=unrounded) if told else nullcontext():
        return plain.load_plain(folder, held, trained.dtype, architecture, streamed, values, made)


def grown_base(trained: Trained, folder: Path, streamed: StreamedLayers | None, *, unrounded: bool = False) -> Any:
    """Load the base in transformers with every weight as in the files, and rows for the added tokens.

    It is ready for an adapter. `unrounded` is as in `stored_base`.
    """
    held = torch.float32 if unrounded else held_in(trained.base)
    model = stored_base(trained, folder, held, streamed, unrounded=unrounded)
    return plain.grow(model, trained.vocabulary).to(plain.device())


def merged_base(trained: Trained, folder: Path) -> Trained:
    """Return the checkpoint with the model in `folder`, which is in codes, in the place of its base."""
    model = trained.config.model.model_copy(update={"base": str(folder), "revision": None})
    return replace(trained, base=resolve_base(model))


def held_in(base: Base) -> torch.dtype:
    """Return the type that holds every weight of the files without loss."""
    types = {source.dtype for source in base.weights.values() if source.dtype in WEIGHT_DTYPES}
    return SOURCE_DTYPES[types.pop()] if len(types) == 1 else torch.float32


def _fits_in_fp32(trained: Trained) -> bool:
    return trained.side("fp32").fits(trained.room)


def _free_gpu_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def _with_trained(
    run: str, step: int, rows: int, streamed: bool, work: Callable[..., T], arguments: tuple[Any, ...]
) -> T:
    with scratch_folder("verify") as folder:
        return work(Trained.at(open_store(run), step, Path(folder) if streamed else None, rows), *arguments)


def _say(sentence: str) -> None:
    """Print a line of the process that `capstan export` starts (trainer/export/__main__.py)."""
    print_sentence(f"--verify: {sentence}")


@contextmanager
def directory_of(store: Store) -> Iterator[Path]:
    """Give transformers and PEFT, which read only directories, a directory with a store's files.

    The files are there already, or are copied for a while.
    """
    local = store.local_folder
    if local is not None:
        yield local
        return
    with scratch_folder("verify") as folder:
        for entry in store.list():
            copy_object(store, entry, Path(folder))
        yield Path(folder)


@contextmanager
def base_directory(base: Base) -> Iterator[Path]:
    """Give the same for a base.

    Its small files are on this machine already, and a run may have another config.json for it.
    """
    local = base.store.local_folder
    configs = [(folder / CONFIG).read_bytes() for folder in (local, base.directory) if folder is not None]
    if local is not None and configs[0] == configs[1]:
        yield local
        return
    with scratch_folder("base") as folder:
        copy_weights(base, Path(folder))
        yield Path(folder)


@contextmanager
def dequantized_by_transformers(config: PretrainedConfig, *, unrounded: bool = False) -> Iterator[None]:
    """Inside, `from_pretrained` decodes the base's weights to bf16 on any device. `config` is the base's. FP8 can stay
    `unrounded`.

    FP8's tiles have the size that `config` says. transformers 5.24 itself divides a matrix into as many equal tiles as
    there are scales. That is right only for whole tiles, so a matrix is padded with zeros and cut again.
    tests/unit/base/test_stored_formats.py fails when this is no longer needed.
    """
    stored: Any = config.quantization_config
    stored["dequantize"] = True
    tile, by_number = stored.get("weight_block_size", [128, 128]), Fp8Dequantize._dequantize_one

    def by_size(
        self: Fp8Dequantize, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None
    ) -> Tensor:
        if quantized.dtype == torch.int8:  # two numbers of 4 bits
            return by_number(self, quantized, scales, output_dtype or torch.bfloat16)
        rows, columns = quantized.shape[-2:]
        down, across = tile or (rows, columns)
        whole = nn.functional.pad(quantized.view(torch.uint8), (0, -columns % across, 0, -rows % down))
        values = by_number(self, whole.view(quantized.dtype), scales, torch.float32 if unrounded else torch.bfloat16)
        return values[..., :rows, :columns].to(output_dtype or torch.bfloat16)

    Fp8Dequantize._dequantize_one = by_size
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = by_number


def decoded_here(base: Base, *, unrounded: bool) -> dict[str, Tensor]:
    """Return the values of all weights in the files of a base, by name. The whole base is then in memory."""
    found = dict[str, Tensor]()
    for name, source in base.weights.items():
        assert not isinstance(source, PackedTensor)
        if unrounded and isinstance(source, Coded):
            source = replace(source, dtype="F32")
        values = as_tensor(source.read(0, numel(source)), source) if numel(source) else torch.empty(0)
        found[name] = values.view(source.shape)
    return found
