"""Loads safetensors files into a sharded, quantized model. No rank ever holds more of the base than its share.

A load has three parts: the shapes, from the files' headers and the settings (`find_weights`, `load_model`); the room
for this rank's share of each parameter (`place_partitions`: partitions in place of the parameters on `meta`, and 4-bit
modules in place of its matrices); and the reading, which a `ShareSource` does. A source that already has the bytes in
memory may also provide the room.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.base.base import Base
from trainer.base.describe.empty_model import unfilled_model
from trainer.base.describe.language_model import model_config
from trainer.base.find.check import left_out_sentence
from trainer.base.load.cache import MANIFEST, BaseCache, cache_key, parse_manifest, read_manifest, write_cache
from trainer.base.partitions.filling import copied, copied_whole, copy_packed, make_packed, quantized
from trainer.base.partitions.reading import Job, run_jobs
from trainer.base.rows.packed_parts import kept_sources
from trainer.base.rows.parameters import find_weights
from trainer.base.unreadable import read_by_transformers
from trainer.config import Config, Quant
from trainer.config.row_kinds import ROW_KINDS
from trainer.errors import Damaged, NotFound
from trainer.model.activations import arrange_activations
from trainer.model.attention import Attention
from trainer.model.documents import keep_documents_apart
from trainer.model.experts import IMPLEMENTATION, prepare_experts
from trainer.model.head import LossHead
from trainer.model.held.layers import HeldWeights, hold
from trainer.model.kernels.liger import Kernels
from trainer.processes.accelerator import is_accelerator
from trainer.processes.ranks import Apart, World
from trainer.state.kept import Shares
from trainer.state.zero.partition import Partition, Partitioner, Room, own_room
from trainer.state.zero.policy import Scope
from trainer.store.safetensors_index import PackedSources, PackedTensor, StoredTensor
from trainer.store.store import Store, open_run_store

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


PackedOf = Callable[[str], PackedSources | None]
"""The packed weights of the module at a path, or None where there are none to be read."""


def nothing_packed(_path: str) -> None:
    """The source of packed weights for a load without any: they are made from the files' weights."""


class Filling(NamedTuple):
    """Makes the jobs that fill a part of the model, from packed weights if these can be read.

    It also has the parameters and buffers that they fill.
    """

    jobs: Callable[[PackedOf], Sequence[Job]]
    filled: Sequence[Tensor]


@dataclass
class Placement:
    """The packed modules, by their names before adapters wrap them, and what fills the partitions."""

    packed: dict[str, tuple[HeldWeights, dict[str, Partition]]] = field(default_factory=dict)
    fillings: list[Filling] = field(default_factory=list)

    def jobs(self, stored: PackedOf = nothing_packed) -> list[Job]:
        """The jobs that fill all partitions. Raises `Damaged` if packed weights have other sizes."""
        return [job for filling in self.fillings for job in filling.jobs(stored)]

    def only(self, owners: Collection[Tensor]) -> "Placement":
        """The same, with what fills these parameters and buffers alone."""
        wanted = set(map(id, owners))
        return Placement(self.packed, [one for one in self.fillings if wanted & set(map(id, one.filled))])

    def partitions(self) -> dict[str, Partition]:
        """The partitions of all packed parameters, by name."""
        return {
            f"{path}.{name}": partition for path, (_, made) in self.packed.items() for name, partition in made.items()
        }

    def means(self) -> dict[str, list[float]]:
        """The means of absmax by module, under double quantization."""
        return {path: module.absmax_mean.tolist() for path, (module, _) in self.packed.items() if module.form.means}


class ShareSource(Protocol):
    """Gives each rank the bytes of its share."""

    @property
    def room(self) -> Room:
        """The memory in which the partitions lie."""
        ...

    def fill(self, placement: Placement, world: World, log: Callable[[str], None]) -> int:
        """Fill all partitions. Returns the bytes that this rank has read from a store. Collective.

        Raises:
            CapstanError: on every rank, if one cannot read a tensor.
        """
        ...


Refill = Callable[[Collection[Tensor]], None]
"""Reads parameters and buffers of the base again, into the memory that they have. Collective, and all ranks name the
same ones. Raises `CapstanError` on every rank, if one cannot read a tensor.
"""


def nothing_refilled(_owners: Collection[Tensor]) -> None:
    """The refill of a model that has no base in a store."""


@dataclass
class LoadReport:
    """The work of a load on this rank: bytes read from the store, bytes kept, and seconds.

    `kernels` has the kernels that `model.kernels` selected, and `refill` reads parts of the base again.
    """

    read_bytes: int = 0
    kept_bytes: int = 0
    seconds: float = 0.0
    kernels: str = "none"
    refill: Refill = nothing_refilled


def load_model(
    base: Base,
    config: Config,
    deepspeed_config: dict[str, Any],
    ranks: World,
    attention: Attention,
    scope: Scope,
    log: Callable[[str], None] = lambda text: None,
    kept: Shares | None = None,
) -> tuple[PreTrainedModel, LoadReport]:
    """Load the base, frozen and sharded over the ranks by `scope`. `log` gets rank 0's progress. Collective.

    On a CPU the shares lie in `kept`. A rank that finds its own there reads nothing, if the others can read apart.

    Raises:
        CapstanError: on every rank, if one rank cannot read a tensor, if the files lack it or have it in another shape
            or type, or if `model.kernels` cannot be used.
    """
    started = time.monotonic()
    dtype, kernels = DTYPES[config.model.dtype], Kernels(config.model.kernels, ranks.device)

    def fill(source: ShareSource, *, apart: bool = False) -> _Filled:
        with ranks.agreeing():
            base.stored.check(base, config)
            model = empty_model(base, config, attention, kernels)
            weights = find_weights(base, model, config.model.layers)
        if ranks.rank == 0:
            log(f"kernels: {kernels.name} ({kernels.why})")
            if weights.left_out and not ROW_KINDS[config.data.kind].sees:
                log(left_out_sentence(weights.left_out))
        if kept is not None:
            kept.begin()
        partitioner = Partitioner(deepspeed_config, dtype, scope, ranks, source.room, apart=apart)
        quantizable = base.architecture.quantizable()
        placement = place_partitions(model, config.quant, dtype, partitioner, weights.sources, quantizable)
        return _Filled(model, placement, partitioner, source, filled_from(source, placement, apart=apart))

    def filled_from(source: ShareSource, placement: Placement, *, apart: bool) -> int:
        if not apart:
            return source.fill(placement, ranks, log)
        with ranks.agreeing():
            return source.fill(placement, Apart(0, 1, 1, 0, ranks.device), log)

    def read(room: Room) -> _Filled:
        return _through_cache(base, config, ranks, fill, room, log) if config.quant.cache else fill(Files(base, room))

    if kept is None or is_accelerator(ranks.device):
        filled = read(own_room)
    else:
        key = json.dumps([base.versions, config.model.model_dump(), config.quant.model_dump(), scope, ranks.world_size])
        means = kept.found(key)
        found = [bool(there) for (there,) in ranks.gather(means is not None)]
        filled = None
        if all(found):
            assert means is not None
            filled = fill(InMemory(kept.room, means))
        elif any(found):
            with suppress(Damaged):  # on all ranks; they read together then
                if (single := _single(base, config, scope, ranks, kept.room)) is not None:
                    filled = fill(single if means is None else InMemory(kept.room, means), apart=True)
                    if means is None:
                        kept.keep(key, filled.placement.means())
        if filled is None:
            kept.forget()
            filled = read(kept.room)
            kept.keep(key, filled.placement.means())
    filled.partitioner.end_reading()

    def refill(owners: Collection[Tensor]) -> None:
        partitioner, source = filled.partitioner, filled.source
        if partitioner.apart or isinstance(source, InMemory):
            source = _stored(base, config, ranks)
        partitioner.begin_reading()
        filled_from(source, filled.placement.only(owners), apart=partitioner.apart)
        partitioner.end_reading()

    model = filled.model
    for buffer in model.buffers():
        buffer.data = buffer.data.to(ranks.device)
    seconds = time.monotonic() - started
    return model, LoadReport(filled.read_bytes, filled.partitioner.kept_bytes, seconds, kernels.name, refill)


@dataclass(frozen=True)
class _Filled:
    """The sharded model without adapters, and the bytes that this rank read for it."""

    model: PreTrainedModel
    placement: Placement
    partitioner: Partitioner
    source: ShareSource
    read_bytes: int


def _stored(base: Base, config: Config, ranks: World) -> ShareSource:
    """The cache of the quantized base, if the run has one, or the base's own files. Collective."""
    if config.quant.cache:
        store = open_run_store(config)
        folder = store.sub(ranks.on_first(lambda: cache_key(base, config)))
        with suppress(Damaged, NotFound):
            return Cached(base, parse_manifest(folder, ranks.on_first(lambda: read_manifest(folder))))
    return Files(base)


def _through_cache(
    base: Base,
    config: Config,
    ranks: World,
    fill: Callable[[ShareSource], _Filled],
    room: Room,
    log: Callable[[str], None],
) -> _Filled:
    """Load from the store's quantized base. If it is missing or damaged, load from the files and write it."""
    folder = _cache_folder(base, config, ranks)
    if _is_there(folder, ranks):
        try:
            manifest = ranks.on_first(lambda: read_manifest(folder))
            return fill(Cached(base, parse_manifest(folder, manifest), room))
        except Damaged as error:
            if ranks.rank == 0:
                log(f"quant.cache: {error} The base is quantized from its source again.")
            with ranks.agreeing():
                if ranks.rank == 0:
                    folder.delete(MANIFEST)
    filled = fill(Files(base, room))
    placement = filled.placement
    write_cache(folder, placement.partitions(), placement.means(), filled.partitioner, ranks, log)
    return filled


def _cache_folder(base: Base, config: Config, ranks: World) -> Store:
    """The folder of the base's cache. Collective."""
    # One rank computes the key: nodes with their own copies of the files see different times of change.
    return open_run_store(config).sub(ranks.on_first(lambda: cache_key(base, config)))


def _is_there(folder: Store, ranks: World) -> bool:
    """Whether the cache is committed. Collective."""
    with ranks.agreeing():
        # Only one rank checks: another might see a cache that is committed at this very moment.
        there = ranks.rank == 0 and folder.exists(MANIFEST)
    return bool(ranks.broadcast(there))


def _single(base: Base, config: Config, scope: Scope, ranks: World, room: Room) -> ShareSource | None:
    """Return the source from which a rank can fill its partitions alone, while others keep theirs. Collective.

    It is None if all ranks have to do it together.

    Scales that are quantized once more are computed from those of all ranks, so such a base needs its cache.
    """
    if config.quant.cache:
        folder = _cache_folder(base, config, ranks)
        if not _is_there(folder, ranks):
            return None
        return Cached(base, parse_manifest(folder, ranks.on_first(lambda: read_manifest(folder))), room)
    return Files(base, room) if scope == "world" and config.quant.held.of(None).spanning is None else None


def empty_model(base: Base, config: Config, attention: Attention, kernels: Kernels | None = None) -> PreTrainedModel:
    """The model of `unfilled_model`, without the tensors of its files, and with a `LossHead` as head."""
    with read_by_transformers(base.name, "config.json"):
        architecture = model_config(base.directory, config.model.layers)
        architecture.get_text_config().use_cache = False
        model = unfilled_model(
            architecture,
            DTYPES[config.model.dtype],
            attn_implementation=attention.name,
            experts_implementation=IMPLEMENTATION,
        )
    if kernels is not None:  # before others wrap the forward passes of these modules
        kernels.apply(model)
    prepare_experts(model)
    plain: Any = model.get_output_embeddings()
    facts = base.architecture
    head = LossHead(plain.in_features, plain.out_features, bias=False, device="meta")
    head.weight, head.bias = plain.weight, plain.bias
    head.factor, head.divisor, head.softcap = facts.logit_factor, facts.logit_divisor, facts.softcap
    model.set_submodule(facts.head.removesuffix(".weight"), head)
    keep_documents_apart(model)
    arrange_activations(model, config.train)
    return model.train()


@dataclass(frozen=True)
class Files:
    """The base's own files. Weights are quantized on the way if necessary."""

    base: Base
    room: Room = own_room

    def fill(self, placement: Placement, world: World, log: Callable[[str], None]) -> int:
        before = self.base.store.range_bytes
        run_jobs(placement.jobs(), world, log, self.base.store.pace)
        return self.base.store.range_bytes - before


@dataclass(frozen=True)
class Cached:
    """The quantized base of another start (`quant.cache`). Weights that are not quantized come from the files."""

    base: Base
    cache: BaseCache
    room: Room = own_room

    def fill(self, placement: Placement, world: World, log: Callable[[str], None]) -> int:
        stores = (self.base.store, self.cache.store)
        before = sum(store.range_bytes for store in stores)
        run_jobs(placement.jobs(self.cache.sources), world, log, self.cache.store.pace)
        return sum(store.range_bytes for store in stores) - before


@dataclass(frozen=True)
class InMemory:
    """The shares that the ranks before these have left in memory, with the `means` of their scales, by module."""

    room: Room
    _means: Mapping[str, list[float]]

    def fill(self, placement: Placement, world: World, log: Callable[[str], None]) -> int:
        for path, means in self._means.items():
            placement.packed[path][0].absmax_mean.copy_(torch.tensor(means))
        if world.rank == 0:
            log("the base is in this machine's memory: nothing is read")
        return 0


def place_partitions(
    model: PreTrainedModel,
    quant: Quant,
    dtype: torch.dtype,
    partitioner: Partitioner,
    sources: Mapping[str, StoredTensor | PackedTensor],
    quantizable: Collection[str],
) -> Placement:
    """Replace every parameter and every stored buffer of `model`. Each keeps the type that it has on `meta`.

    Args:
        dtype: the type of products with quantized weights.
        sources: where each parameter and buffer is read from.
        quantizable: the names of the weights that `quant` quantizes.
    """
    placement, parameters, held = Placement(), dict(model.named_parameters()), quant.held
    for name in [name for name in sources if name not in parameters]:
        values, job = _place_buffer(model, name, sources[name], partitioner)
        placement.fillings.append(Filling(lambda _, job=job: [job], [values]))
    for name, parameter in parameters.items():
        path, source = name.removesuffix(".weight"), sources[name]
        as_it_is = kept_sources(source) if name in quantizable and not held.quantizes else None
        form = held.of(as_it_is and as_it_is.kept)
        if name not in quantizable or not form.packs:
            assert not isinstance(source, PackedTensor)
            partition = partitioner.make(parameter.shape, parameter.dtype)
            _replace(model, parameter, partition.parameter)
            job = copied(source, partition, partitioner)
            placement.fillings.append(Filling(lambda _, job=job: [job], [partition.parameter]))
            continue
        packed = hold(model, name, parameter, form, dtype)
        made = make_packed(packed, partitioner)
        placement.packed[path] = packed, made
        own = source.sources if isinstance(source, PackedTensor) else None
        given = own if as_it_is is None else as_it_is.sources
        jobs = partial(_fill_packed, path, packed, made, given, source, partitioner)
        filled = [partition.parameter for partition in made.values()]
        placement.fillings.append(Filling(jobs, [*filled, *packed.buffers(recurse=False)]))
    return placement


def _fill_packed(
    path: str,
    module: HeldWeights,
    made: dict[str, Partition],
    given: PackedSources | None,
    source: StoredTensor | PackedTensor,
    partitioner: Partitioner,
    stored: PackedOf,
) -> Sequence[Job]:
    """The jobs that fill the partitions `made` for the `module` at `path`.

    They use the packed weights that the base has (`given`) or that are `stored` elsewhere, or else the weight in
    `source`.
    """
    found = stored(path) if given is None else given
    if found is not None:
        return copy_packed(module, made, found, partitioner)
    assert not isinstance(source, PackedTensor)
    return [quantized(source, module, made, partitioner)]


def _place_buffer(
    model: nn.Module, name: str, source: StoredTensor | PackedTensor, partitioner: Partitioner
) -> tuple[Tensor, Job]:
    """A buffer, and the job that fills it. Buffers are small, so every rank holds the whole one."""
    assert not isinstance(source, PackedTensor)
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    values = partitioner.room(torch.empty_like(owner.get_buffer(leaf), device=partitioner.device))
    owner.register_buffer(leaf, values)
    return values, copied_whole(source, values.view(-1), partitioner)


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Replace a parameter in every module that shares it, so that a tied weight stays tied."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter is old:
                setattr(module, name, new)
