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
    kernels = Kernels(config.model.kernels, ranks.device)
    load = _Load(base, config, deepspeed_config, ranks, attention, kernels, scope, log, kept)
    filled = load.from_store(own_room) if kept is None or is_accelerator(ranks.device) else load.from_memory(kept)
    filled.partitioner.end_reading()
    for buffer in filled.model.buffers():
        buffer.data = buffer.data.to(ranks.device)
    seconds, kept_bytes = time.monotonic() - started, filled.partitioner.kept_bytes
    return filled.model, LoadReport(filled.read_bytes, kept_bytes, seconds, kernels.name, partial(load.refill, filled))


@dataclass(frozen=True)
class _Filled:
    """The sharded model without adapters, and the bytes that this rank read for it."""

    model: PreTrainedModel
    placement: Placement
    partitioner: Partitioner
    source: ShareSource
    read_bytes: int


@dataclass(frozen=True, eq=False)
class _Load:
    """A load on this rank, with the arguments of `load_model`. All of its methods are collective."""

    base: Base
    config: Config
    deepspeed_config: dict[str, Any]
    ranks: World
    attention: Attention
    kernels: Kernels
    scope: Scope
    log: Callable[[str], None]
    kept: Shares | None

    def from_store(self, room: Room) -> _Filled:
        """Load from the store's quantized base, if the run keeps one, or from the base's own files."""
        return self._through_cache(room) if self.config.quant.cache else self._filled(Files(self.base, room))

    def from_memory(self, kept: Shares) -> _Filled:
        """Load what the ranks before these have left in `kept`. What is missing there is read into it."""
        config, ranks = self.config, self.ranks
        settings = [config.model.model_dump(), config.quant.model_dump()]
        key = json.dumps([self.base.versions, *settings, self.scope, ranks.world_size])
        means = kept.found(key)
        found = [bool(there) for (there,) in ranks.gather(means is not None)]
        if all(found):
            assert means is not None
            return self._filled(InMemory(kept.room, means))
        if any(found):
            with suppress(Damaged):  # on all ranks; they read together then
                if (single := self._single(kept.room)) is not None:
                    filled = self._filled(single if means is None else InMemory(kept.room, means), apart=True)
                    if means is None:
                        kept.keep(key, filled.placement.means())
                    return filled
        kept.forget()
        filled = self.from_store(kept.room)
        kept.keep(key, filled.placement.means())
        return filled

    def refill(self, filled: _Filled, owners: Collection[Tensor]) -> None:
        """Read these parameters and buffers of the model again, as `Refill` says."""
        partitioner, source = filled.partitioner, filled.source
        if partitioner.apart or isinstance(source, InMemory):
            source = self._stored()
        partitioner.begin_reading()
        self._fill(source, filled.placement.only(owners), apart=partitioner.apart)
        partitioner.end_reading()

    def _filled(self, source: ShareSource, *, apart: bool = False) -> _Filled:
        """The model with the shares that `source` gives. With `apart` each rank reads its share without the others."""
        base, config, ranks = self.base, self.config, self.ranks
        with ranks.agreeing():
            base.stored.check(base, config)
            model = empty_model(base, config, self.attention, self.kernels)
            weights = find_weights(base, model, config.model.layers)
        if ranks.rank == 0:
            self.log(f"kernels: {self.kernels.name} ({self.kernels.why})")
            if weights.left_out and not ROW_KINDS[config.data.kind].sees:
                self.log(left_out_sentence(weights.left_out))
        if self.kept is not None:
            self.kept.begin()
        dtype = DTYPES[config.model.dtype]
        partitioner = Partitioner(self.deepspeed_config, dtype, self.scope, ranks, source.room, apart=apart)
        quantizable = base.architecture.quantizable()
        placement = place_partitions(model, config.quant, dtype, partitioner, weights.sources, quantizable)
        return _Filled(model, placement, partitioner, source, self._fill(source, placement, apart=apart))

    def _fill(self, source: ShareSource, placement: Placement, *, apart: bool) -> int:
        if not apart:
            return source.fill(placement, self.ranks, self.log)
        with self.ranks.agreeing():
            return source.fill(placement, Apart(0, 1, 1, 0, self.ranks.device), self.log)

    def _through_cache(self, room: Room) -> _Filled:
        """Load from the store's quantized base. If it is missing or damaged, load from the files and write it."""
        ranks, folder = self.ranks, self._cache_folder()
        if self._is_there(folder):
            try:
                return self._filled(Cached(self.base, self._cache_in(folder), room))
            except Damaged as error:
                if ranks.rank == 0:
                    self.log(f"quant.cache: {error} The base is quantized from its source again.")
                with ranks.agreeing():
                    if ranks.rank == 0:
                        folder.delete(MANIFEST)
        filled = self._filled(Files(self.base, room))
        placement = filled.placement
        write_cache(folder, placement.partitions(), placement.means(), filled.partitioner, ranks, self.log)
        return filled

    def _single(self, room: Room) -> ShareSource | None:
        """Return the source from which a rank can fill its partitions alone, while others keep theirs.

        It is None if all ranks have to do it together.

        Scales that are quantized once more are computed from those of all ranks, so such a base needs its cache.
        """
        if self.config.quant.cache:
            folder = self._cache_folder()
            return Cached(self.base, self._cache_in(folder), room) if self._is_there(folder) else None
        alone = self.scope == "world" and self.config.quant.held.of(None).spanning is None
        return Files(self.base, room) if alone else None

    def _stored(self) -> ShareSource:
        """The cache of the quantized base, if the run has one, or the base's own files."""
        if self.config.quant.cache:
            folder = self._cache_folder()
            with suppress(Damaged, NotFound):
                return Cached(self.base, self._cache_in(folder))
        return Files(self.base)

    def _cache_folder(self) -> Store:
        # One rank computes the key: nodes with their own copies of the files see different times of change.
        return open_run_store(self.config).sub(self.ranks.on_first(lambda: cache_key(self.base, self.config)))

    def _cache_in(self, folder: Store) -> BaseCache:
        return parse_manifest(folder, self.ranks.on_first(lambda: read_manifest(folder)))

    def _is_there(self, folder: Store) -> bool:
        """Whether the cache is committed."""
        with self.ranks.agreeing():
            # Only one rank checks: another might see a cache that is committed at this very moment.
            there = self.ranks.rank == 0 and folder.exists(MANIFEST)
        return bool(self.ranks.broadcast(there))


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
