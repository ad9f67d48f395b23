"""Proof of an export: in plain transformers (and PEFT) it predicts what the model that Capstan trained predicts.

Compared are distributions over the next token on rows of the run's own data (trainer/export/proof/distributions.py), in fp32: there
the two sides differ by the order of additions alone. Where fp32 does not fit, or the base is stored in 4 bits for products in
bf16, both sides compute in `model.dtype`. In either case the allowed difference is measured on the spot, by moving the
last bits of every product. The adapter's own effect is the control: a difference that is allowed must be smaller.

Each side is a process of its own (trainer/export/proof/process.py). It is on the GPU where it fits there, whole or a decoder layer at a time,
else on the CPU (trainer/export/proof/placement.py).

A merged model is not quite the trained one where the base was quantized for training, as it is merged into the base's own
weights. Only the merging is proven for it: it predicts what PEFT's own merge predicts, rounded to the same types.

Before that every format compares the export's bytes with those of a second one (trainer/export/proof/same_bytes.py), and here its tokenizer and chat template
must give the run's texts the tokens of the training (trainer/export/proof/rendering.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor

from trainer.base.describe.meta import model_config
from trainer.base.find.locate import CONFIG, Base, copy_object, copy_weights, is_small_file
from trainer.base.find.tokenizer import find_rows
from trainer.base.load.load import DTYPES, empty_model
from trainer.base.partitions.filling import SOURCE_DTYPES
from trainer.base.rows.parameters import FoundWeights, find_all_weights
from trainer.config import Config, override
from trainer.export.figures import Proof
from trainer.export.folder import local_folder
from trainer.export.proof import plain
from trainer.export.proof.dequantized import decoded_here, dequantized_by_transformers
from trainer.export.proof.distributions import Distance, distance
from trainer.export.proof.heads import judged, outputs_of_row
from trainer.export.proof.placement import ProofSide, Room, exported_side, trained_side
from trainer.export.proof.process import aside
from trainer.export.proof.rendering import check_rendering, trained_texts
from trainer.export.proof.rows import Probe, ProbeRow, find_probe
from trainer.export.proof.source_rows import source_rows
from trainer.export.proof.streamed import StreamedLayers
from trainer.export.trained import resolve_trained_base, trained_config
from trainer.export.write.adapter import export_adapter
from trainer.plan.assemble import Sharding, assemble, attention_of
from trainer.plan.resolve import Resolved
from trainer.processes.accelerator import is_accelerator
from trainer.processes.devices import host_memory_left, local_gpus
from trainer.processes.ranks import join
from trainer.state.checkpoint.checkpoints import load_partitions
from trainer.state.checkpoint.learner import TrainablePartition
from trainer.state.checkpoint.manifest import CheckpointManifest, read_manifest
from trainer.state.optimizer.optimizer import MASTER
from trainer.state.zero.policy import build_deepspeed_config
from trainer.store.safetensors_index import WEIGHT_DTYPES
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_store
from trainer.tuning.head import WithHead, head_of
from trainer.tuning.method import Method, method_of
from trainer.tuning.objective.sft.objective import NextTokens

T = TypeVar("T")

# How far a product's outputs are moved to measure what rounding does, as a share of themselves: one last bit in bf16; in fp32
# five bits, as the order of thousands of additions reaches so far.
_SHAKEN_BY = {"bf16": 2**-8, "fp32": 2**-18}
# A divergence grows with the square of a difference.
_TOLERATED_NOISE = 3.0
# The policy by which our engine has a layer's weights on the GPU for its turn only.
_A_LAYER_AT_A_TIME = "zero3_offload_cpu"


@dataclass(frozen=True)
class Trained:
    """The checkpoint that was exported, as it was trained. `scratch` is a folder for a side that computes a decoder layer at a time."""

    run: Store
    manifest: CheckpointManifest
    config: Config
    base: Base
    scratch: Path | None = None

    @classmethod
    def at(cls, folder: Store, step: int, scratch: Path | None = None) -> "Trained":
        manifest = read_manifest(folder, step)
        config = trained_config(folder, manifest)
        return cls(folder, manifest, config, resolve_trained_base(folder, config.model, manifest), scratch)

    @cached_property
    def room(self) -> Room:
        """The memory of this machine that is free before either side is loaded."""
        return Room(aside("gpu", _free_gpu_memory) if local_gpus() else 0, host_memory_left())

    def side(self, computed_in: str) -> ProofSide:
        """This checkpoint in our own loader."""
        learnt = sum(self.manifest.numels.values())
        return trained_side(self.base.architecture, self.config.quant, learnt, DTYPES[computed_in].itemsize)

    def predictions(self, *, learnt: bool = True) -> list[Tensor]:
        """`logits` of a process of its own."""
        return self._aside(self.side(self.computed_in), Trained.logits, self.computed_in, learnt)

    def exported(self, work: Callable[..., T], *arguments: Any, packed: bool, recoded: bool = False) -> T:
        """`work(self, *arguments)` in a process that has room for an exported model. What is stored in fewer bits, as a `recoded` model
        is, transformers unpacks whole."""
        model, stored = self.base.architecture, self.base.stored
        held = max(held_in(self.base), self.dtype, key=lambda dtype: dtype.itemsize)
        refused = "what is stored in 4 or 8 bits is read whole" if recoded or stored.quantized or stored.decoded else ""
        side = exported_side(model, self.config.quant, held.itemsize, packed=packed, refused=refused)
        return self._aside(side, work, *arguments)

    def _aside(self, side: ProofSide, work: Callable[..., T], *arguments: Any) -> T:
        place = side.place(self.room)
        _say(side.sentence(self.room))
        return aside(place.device, _with_trained, self.run.uri, self.manifest.step, place.streamed, work, arguments)

    def streamed_layers(self) -> StreamedLayers | None:
        """The layers that are read at their turns; a class with another head is loaded whole."""
        return StreamedLayers(self.scratch) if self.scratch and self.head is None else None

    @cached_property
    def method(self) -> Method:
        return method_of(self.config)

    @property
    def head(self) -> WithHead | None:
        return head_of(self.method)

    @cached_property
    def probe(self) -> Probe:
        return judged(find_probe(self.run, self.config, self.manifest, self.base), self.head)

    @cached_property
    def weights(self) -> FoundWeights:
        return find_all_weights(self.base)

    @property
    def vocabulary(self) -> int:
        """Rows of the trained model's embedding, those of added tokens included."""
        return max(self.base.architecture.vocabulary, *(row + 1 for row, _ in find_rows(self.config.model)), 0)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.model.dtype]

    @cached_property
    def computed_in(self) -> str:
        exact = not self.base.stored.quantized and _fits_in_fp32(self)
        return "fp32" if exact else self.config.model.dtype

    def check_texts(self, destination: Store) -> None:
        """Raises `CapstanError` where the tokenizer or the template in `destination` is not the run's."""
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
        """Through our own sharded loader, engine and restore, as one rank: for each row (P, V) fp32. Without what was `learnt`
        those before the first step, over the base as it was quantized for the training."""
        ranks, base = join(), self.base
        changes = [f"model.dtype={computed_in}", "model.attention=auto", "model.kernels=none", "quant.cache=false"]
        changes.append("sharding.sequence_parallel=1")
        if self.scratch:
            changes.append(f"sharding.deepspeed={_A_LAYER_AT_A_TIME}")
        config = override(self.config, *changes)
        resolved = replace(Resolved.of(config, base), objective=NextTokens())
        attention = attention_of(resolved, ranks.device)
        on_gpu = is_accelerator(ranks.device)
        settings = build_deepspeed_config(config, world_size=ranks.world_size, accumulation=1, on_gpu=on_gpu)
        engine, _ = assemble(resolved, ranks, attention, Sharding(settings, "world"))
        plain.round_buffers(engine.model, dict(empty_model(base, self.config, attention).named_buffers()))
        if learnt:
            partitions = engine.partitions()
            load_partitions(self.run, self.manifest, partitions, states=(MASTER,))
            for part in partitions:  # as the forward passes of the training had them, and as they are exported
                part.states["master"].copy_(self._exported(part))
            engine.refresh(self.manifest.updates)
        if self.head is not None:
            return [outputs_of_row(engine, row) for row in self.probe.rows]
        return [
            engine.logits(row.tokens.to(ranks.device))[0, row.places.to(ranks.device)].float().cpu()
            for row in self.probe.rows
        ]

    def _exported(self, part: TrainablePartition) -> Tensor:
        values = part.states["master"].to(self.dtype)
        if not self.method.exports_model:
            return values
        return values.to(SOURCE_DTYPES[self.weights.sources[part.name].dtype])


def prove_adapter(folder: Store, step: int, adapter: Store) -> Proof:
    """The model of `step` against the exported adapter."""
    trained = Trained.at(folder, step)
    if trained.method.exports_model:
        return _prove_model(trained, adapter)
    trained.check_texts(adapter)
    computed_in, rows = trained.computed_in, trained.probe.rows
    expected = trained.predictions()
    packed = trained.config.quant.quantizes
    found, allowed, effect = trained.exported(_adapter_side, adapter.uri, computed_in, packed=packed)
    return make_proof(trained.probe, computed_in, distance(expected, found, rows), allowed, effect)


def _adapter_side(trained: Trained, adapter: str, computed_in: str) -> tuple[list[Tensor], Distance, Distance]:
    """The base with the exported adapter: its logits, how far rounding may move them, and how far they are from the base's own."""
    rows, look = trained.probe.rows, plain.head_logits if trained.head else plain.place_logits
    with base_directory(trained.base) as base, directory_of(open_store(adapter)) as folder:
        model = _plain_base(trained, base, computed_in, plain.adapted_weights(folder))
        model, without = plain.add_adapter(model, folder, trained.method)
        with _computing(model, computed_in):
            found, allowed = _predictions(model, rows, computed_in, look)
            with without:
                effect = distance(found, look(model, rows), rows)
    return found, allowed, effect


def prove_merged(folder: Store, step: int, merged: Store) -> Proof:
    """The merged model against PEFT's merge of the exported adapter, in fp32; and, for information, the model of `step`."""
    trained = Trained.at(folder, step)
    if trained.method.exports_model:
        return _prove_model(trained, merged)
    trained.check_texts(merged)
    rows = trained.probe.rows
    as_trained = trained.predictions()
    beside, alone, expected, allowed = trained.exported(_merging_side, packed=False)
    found = trained.exported(_merged_side, merged.uri, packed=False)
    return make_proof(
        trained.probe,
        "fp32",
        distance(expected, found, rows),
        allowed,
        distance(found, alone, rows),
        trained_kl=distance(as_trained, found, rows).kl,
        rounding_kl=distance(beside, found, rows).kl,
    )


def _merging_side(trained: Trained) -> tuple[list[Tensor], list[Tensor], list[Tensor], Distance]:
    """Logits of base and adapter side by side, of the base alone, and of PEFT's own merge; and how far rounding may move these."""
    rows = trained.probe.rows
    stored = {name: SOURCE_DTYPES[source.dtype] for name, source in trained.weights.sources.items()}
    with base_directory(trained.base) as base, scratch_folder("adapter") as folder:
        export_adapter(trained.run, open_store(folder), trained.manifest.step)
        streamed = trained.streamed_layers()
        model = _stored_base(trained, base, held_in(trained.base), streamed)
        model = plain.grow(model, trained.vocabulary).to(plain.device())
        model, without = plain.add_adapter(model, Path(folder), trained.method)
        with plain.computing_in_fp32(model):
            beside = plain.place_logits(model, rows)
            with without:
                alone = plain.place_logits(model, rows)
            plain.merge_and_round(model, stored, trained.base.architecture.embedding, streamed)
            expected, allowed = _predictions(model, rows, "fp32")
    return beside, alone, expected, allowed


def _merged_side(trained: Trained, merged: str) -> list[Tensor]:
    with directory_of(open_store(merged)) as folder:
        model = plain_model(trained, folder)
        with plain.computing_in_fp32(model):
            return plain.place_logits(model, trained.probe.rows)


def _prove_model(trained: Trained, destination: Store) -> Proof:
    """A model whose base has learnt itself: its predictions against those of the model of `step`, with those of the base as it was for
    the effect."""
    trained.check_texts(destination)
    computed_in, rows = trained.computed_in, trained.probe.rows
    expected = trained.predictions()
    found, allowed = trained.exported(_model_side, destination.uri, computed_in, packed=False)
    effect = distance(found, trained.exported(_base_side, computed_in, packed=False), rows)
    return make_proof(trained.probe, computed_in, distance(expected, found, rows), allowed, effect)


def _model_side(trained: Trained, exported: str, computed_in: str) -> tuple[list[Tensor], Distance]:
    with directory_of(open_store(exported)) as folder:
        model = plain_model(trained, folder)
        with _computing(model, computed_in):
            return _predictions(model, trained.probe.rows, computed_in)


def _base_side(trained: Trained, computed_in: str) -> list[Tensor]:
    with base_directory(trained.base) as folder:
        model = _plain_base(trained, folder, computed_in)
        with _computing(model, computed_in):
            return plain.place_logits(model, trained.probe.rows)


def _predictions(
    model: Any,
    rows: Sequence[ProbeRow],
    computed_in: str,
    look: Callable[[Any, Sequence[ProbeRow]], list[Tensor]] = plain.place_logits,
) -> tuple[list[Tensor], Distance]:
    """The logits at the rows' places, and how far from them rounding may be: several times as far as the last bits of every product
    move them."""
    found = look(model, rows)
    with plain.shaken(model, _SHAKEN_BY[computed_in]):
        noise = distance(found, look(model, rows), rows)
    return found, Distance(_TOLERATED_NOISE**2 * noise.kl, _TOLERATED_NOISE * noise.log_prob)


def make_proof(
    probe: Probe,
    computed_in: str,
    found: Distance,
    allowed: Distance,
    effect: Distance,
    *,
    trained_kl: float | None = None,
    rounding_kl: float | None = None,
) -> Proof:
    """The proof of an exported model whose predictions are so far off, may be so far off, and were moved so far by the training."""
    return Proof(
        kl=found.kl,
        kl_allowed=allowed.kl,
        kl_effect=effect.kl,
        log_prob=found.log_prob,
        log_prob_allowed=allowed.log_prob,
        log_prob_effect=effect.log_prob,
        computed_in=computed_in,
        rows=probe.origin,
        trained_kl=trained_kl,
        rounding_kl=rounding_kl,
    )


def plain_model(trained: Trained, folder: Path) -> Any:
    """The model in `folder`, of the base's kind, in transformers."""
    held, streamed = held_in(trained.base), trained.streamed_layers()
    return plain.load_plain(folder, held, trained.dtype, streamed=streamed).to(plain.device())


def _plain_base(trained: Trained, folder: Path, computed_in: str, unpacked: tuple[str, ...] = ()) -> Any:
    """The base in transformers, quantized as it was for training; `unpacked` as in `plain.quantize`."""
    config, dtype = trained.config, DTYPES[computed_in]
    # PEFT keeps a prefix in its base's type, so that of a training in fp32 needs such a base.
    exact = torch.float32 if config.model.dtype == "fp32" else held_in(trained.base)
    streamed = trained.streamed_layers()
    model = _stored_base(trained, folder, exact if computed_in == "fp32" else dtype, streamed)
    if config.quant.quantizes and not trained.base.stored.quantized:
        plain.quantize(model, config.quant, dtype, trained.base.architecture.quantizable(), unpacked, streamed)
    return plain.grow(model, trained.vocabulary).to(plain.device())


def _stored_base(trained: Trained, folder: Path, held: torch.dtype, streamed: StreamedLayers | None) -> Any:
    """The base in transformers as its files have it, decoded where they hold it in fewer bits than 16."""
    base, architecture = trained.base, model_config(folder, trained.config.model.layers)
    made: Any = transformers.AutoModelForCausalLM
    if (head := trained.head) is not None:
        made, architecture.num_labels = getattr(transformers, head.head.transformers_class), head.outputs
    told = base.stored.decoded and base.stored.dequantizes
    values = decoded_here(base) if base.stored.decoded and not told else None
    with dequantized_by_transformers(architecture) if told else nullcontext():
        return plain.load_plain(folder, held, trained.dtype, architecture, streamed, values, made)


@contextmanager
def _computing(model: Any, computed_in: str) -> Iterator[None]:
    if computed_in != "fp32":
        yield
        return
    with plain.computing_in_fp32(model):
        yield


def held_in(base: Base) -> torch.dtype:
    """The type that holds every weight of the files as it is."""
    types = {source.dtype for source in base.weights.values() if source.dtype in WEIGHT_DTYPES}
    return SOURCE_DTYPES[types.pop()] if len(types) == 1 else torch.float32


def _fits_in_fp32(trained: Trained) -> bool:
    return trained.side("fp32").fits(trained.room)


def _free_gpu_memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def _with_trained(run: str, step: int, streamed: bool, work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    with scratch_folder("verify") as folder:
        return work(Trained.at(open_store(run), step, Path(folder) if streamed else None), *arguments)


def _say(sentence: str) -> None:
    """A line of the process that `capstan export` starts (trainer/export/__main__.py)."""
    print("say", f"--verify: {sentence}", flush=True)


@contextmanager
def directory_of(store: Store) -> Iterator[Path]:
    """Where transformers and PEFT, which read directories only, find a store's files: there, or copied for a while."""
    local = local_folder(store)
    if local is not None:
        yield local
        return
    with scratch_folder("verify") as folder:
        for entry in store.list():
            copy_object(store, entry, Path(folder))
        yield Path(folder)


@contextmanager
def base_directory(base: Base) -> Iterator[Path]:
    """The same for a base, whose small files are on this machine already, and of which a run may have another config.json."""
    local = local_folder(base.store)
    configs = [(folder / CONFIG).read_bytes() for folder in (local, base.directory) if folder is not None]
    if local is not None and configs[0] == configs[1]:
        yield local
        return
    with scratch_folder("base") as folder:
        copy_weights(base, Path(folder))
        yield Path(folder)
