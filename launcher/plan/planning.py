"""Puts a plan together: the run's needs, the GPUs that it is meant for, its length, its time and its cost."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil
from typing import Any, Literal, NamedTuple

from launcher.plan.notes import FeatureBytes, Known, empty_rows, notes_of, resizes
from launcher.plan.starts import (
    GPU_HOURS_BETWEEN_FAILURES,
    Restarts,
    StartTime,
    estimated_phases,
    past_starts,
    restarts,
    start_time,
)
from launcher.view.runs import runs
from trainer.base.architecture import Architecture
from trainer.base.base import Description
from trainer.base.find.check import check_sight_at_hand, check_weights_at_hand
from trainer.base.find.locate import AtHand, base_at_hand, resolve_base
from trainer.base.find.media import numbered
from trainer.config import Config
from trainer.config.paths import local_path
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.compile.inputs import check_sources, with_labels
from trainer.data.compile.length import EpochLength, compiled_pictures, epoch_length
from trainer.data.source.files import is_of_hub, unusable
from trainer.errors import CapstanError, ConfigError, DataError, DoesNotFit, StorageError
from trainer.export.refusals import check_asked_exports, export_notes, refused_exports
from trainer.plan.forecast import (
    Forecast,
    GatherTraffic,
    Length,
    PictureWork,
    Rate,
    assumed_rate,
    forecast,
    length_of,
    together,
)
from trainer.plan.gpus import Gpu, find_gpu, read_gpu
from trainer.plan.inputs import value_bytes
from trainer.plan.needs import Plan
from trainer.plan.plan import make_plan
from trainer.plan.resolve import keeps_features, typed
from trainer.plan.seeing import costs_of, usual_size, with_pictures_kept
from trainer.processes.bf16 import slowdown_words, why_processor_is_slow, why_slow
from trainer.processes.devices import described_gpus, host_memory_left, local_gpus, picture_readers
from trainer.processes.helper_thread import patiently
from trainer.run import layout
from trainer.run.folder import name_of, run_config
from trainer.run.records import Record, edge_records, starts_in
from trainer.run.segments import streams
from trainer.store.store import Store, open_store

_RUNS_AT_A_TIME = 16
_EDGE_BYTES = 2**16
# The first steps of a start warm kernels up, and fewer steps than these are no measurement.
_FEWEST_STEPS = 10


def measured_rate(store: Store, config: Config, gpu: Gpu | None) -> Rate | None:
    """Return the rate of the newest run whose rows make the same work, on GPUs of this name.

    If the run is for CPUs, runs on CPUs count. The rate is None if there is no such run, or the store cannot be read.
    `gpu` is None if any GPU will do.
    """
    with suppress(CapstanError), ThreadPoolExecutor(_RUNS_AT_A_TIME) as pool:
        found = pool.map(lambda name: _rate(store.sub(name), config, gpu), runs(store))
        return max(filter(None, found), default=(0.0, None), key=lambda rated: rated[0])[1]
    return None


def _rate(folder: Store, config: Config, gpu: Gpu | None) -> tuple[float, Rate] | None:
    """Return the time of the run's last step, and its rate."""
    with suppress(CapstanError):
        other = run_config(folder)
        if _work(other) != _work(config):
            return None
        found = streams(folder.list(layout.METRICS))
        for number in reversed(starts_in(found)):
            records = edge_records(folder, number, found, _EDGE_BYTES)
            start = next((record for record in records if record["kind"] == "start"), None)
            steps = [record for record in records if record["kind"] == "step"][2:]
            taken = [step for step in steps if step.get("seconds")][-_FEWEST_STEPS:]
            if start and len(taken) == _FEWEST_STEPS and _is_alike(start, config, gpu):
                return taken[-1].get("time", 0.0), _rate_of(other, folder, start, taken)
    return None


def _work(config: Config) -> list[Any]:
    """Return the settings that decide what a rank computes with one row."""
    model, train, base, sees = config.model, config.train, config.model.base, ROW_KINDS[config.data.kind].sees
    if "://" not in base and (path := local_path(base, "model.base")).exists():
        base = str(path)  # as in a run's own configuration, wherever it was started
    return [
        (base, model.layers, model.dtype, config.quant.type),
        (config.tuning.method, config.tuning.targets, config.tuning.experts, config.objective.name),
        (config.data.sequence_length, train.micro_batch, train.activation_checkpointing),
        (config.sharding.sequence_parallel, sees, config.tuning.towers, config.sharding.tower_limit if sees else None),
    ]


def _is_alike(start: Record, config: Config, gpu: Gpu | None) -> bool:
    device = str(start.get("device"))
    on_gpu = device.startswith("cuda")
    if config.cluster.gpus_per_worker == 0 or not on_gpu:
        return config.cluster.gpus_per_worker == 0 and not on_gpu
    found = find_gpu(_card(device))
    return gpu is None or gpu.name in (_card(device), found.name if found else None)


def _card(device: str) -> str:
    """Return the name of the card in "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    return device.partition("(")[2].removesuffix(")")


def _rate_of(config: Config, folder: Store, start: Record, steps: Sequence[Record]) -> Rate:
    ranks, train = start.get("world_size") or 1, config.train
    at_once = max(1, ranks // config.sharding.sequence_parallel) * train.micro_batch
    rows = train.micro_batch * ceil(train.global_batch / at_once) * len(steps)
    seconds = sum(step["seconds"] for step in steps)
    tokens = sum(step.get("tokens") or 0 for step in steps) / ranks / seconds
    device = _card(str(start.get("device"))) or "CPUs"
    basis = (
        f"measured: the run {name_of(folder)} of this store trained {tokens:,.0f} tokens/s a rank, on {ranks}"
        f" ({device}), with the same base, method, quantization and length of rows"
    )
    return Rate(seconds / rows, tokens, basis, name_of(folder))


# A plan is made on a login node, which may not reach the store. Then it does without what the store knows, and asks
# only once.
_STORE_SECONDS = 3.0
Whose = Literal["given", "cluster.slurm.gpu_type", "this machine"]


@dataclass(frozen=True)
class Planned:
    """The plan of a run.

    `gpu` is what it is compared with, and `whose` says why that one; None if no GPU is known. `data_missing` says that
    data is what is short. `forecast` is None if steps or rate are not known. `no_exports` says in sentences which
    exports the run cannot have, and why. `start` is how long a start takes, and `restarts` what those cost that the run
    can expect; None if the time of the run is not known. `pictures` is what its pictures cost, if its rows have any and
    the base is at hand. If it keeps features of them, `features` is what those take.
    """

    plan: Plan
    gpu: Gpu | None
    whose: Whose | None
    length: Length
    forecast: Forecast | None
    data_missing: bool
    start: StartTime
    no_exports: list[str] = field(default_factory=list)
    restarts: Restarts | None = None
    pictures: PictureWork | None = None
    features: FeatureBytes | None = None

    @property
    def fits(self) -> bool | None:
        """Whether a GPU holds its part; None if no GPU is known, or the sizes of the base are not."""
        return fits(self.plan, self.gpu)

    def to_json(self) -> dict[str, Any]:
        """Return the plan's own figures, those that it is compared with, and what follows."""
        gpu = None if self.gpu is None else {**asdict(self.gpu), "whose": self.whose}
        estimate = self.forecast.to_json() if self.forecast else None
        return {
            **self.plan.to_json(),
            "fits": self.fits,
            "gpu": gpu,
            "length": asdict(self.length),
            "estimate": estimate,
            "no_exports": self.no_exports,
            "start": self.start.to_json(),
            "restarts": None if self.restarts is None else asdict(self.restarts),
            "pictures": None if self.pictures is None else asdict(self.pictures),
            "features": None if self.features is None else self.features.to_json(),
        }

    def check(self) -> None:
        """Raise the error of what is wrong or does not fit, if anything is."""
        if self.plan.shortfalls:
            kind = ConfigError if self.plan.mismatches else DataError if self.data_missing else DoesNotFit
            raise kind("\n".join(self.plan.shortfalls))


def fits(plan: Plan, gpu: Gpu | None) -> bool | None:
    """Return whether `gpu` holds its part; None if no GPU is known, or the sizes of the base are not."""
    return None if gpu is None or plan.unrecognised else plan.memory_per_gpu.total <= gpu.memory


class Machine(NamedTuple):
    """The ranks of a run and those of a node, and what each rank has.

    A rank has a `gpu`, and `whose` says why that one. On CPUs it has so many bytes of the host.
    """

    world_size: int
    per_node: int
    gpu: Gpu | None
    whose: Whose | None
    host_memory: int | None


def machine_of(config: Config, gpu: str | None, ranks_per_node: int | None) -> Machine:
    """Return the machine that `config` is planned for. Raises `ConfigError` if the GPU is unknown."""
    found, whose, count = _gpu_of(config, gpu)
    world_size, per_node = _ranks(config, count, ranks_per_node)
    on_cpus = config.cluster.gpus_per_worker == 0
    here = int(host_memory_left() / 2 / per_node) if on_cpus else None  # as the ranks find it
    return Machine(world_size, per_node, found, whose, here)


def typed_for(config: Config, machine: Machine, base: Description) -> tuple[Config, list[str]]:
    """Return `config` with `model.dtype` decided for `machine`, and sentences on what bf16 means there."""
    slow = None
    if config.cluster.gpus_per_worker == 0:
        slow = why_processor_is_slow()
    elif machine.gpu and not machine.gpu.bf16:
        slow = f"{machine.gpu.name} has no bf16"
    decided = typed(config, base, slow=slow is not None)
    if slow is None:
        open_here = config.leaves_type_open and machine.gpu is None and config.cluster.gpus_per_worker is None
        why = why_processor_is_slow() if open_here and not local_gpus() else None
        here = "model.dtype: bf16 on a GPU; on this machine, which has none, the run would compute in fp32"
        return decided, [f"{here}, as {why}"] if why else []
    if config.leaves_type_open and decided.model.dtype == "fp32":
        return decided, [f"model.dtype: fp32, as {slow}"]
    if decided.model.dtype == "bf16":
        here = machine.whose in (None, "this machine")
        much = slowdown_words() if here else "several times as long as in fp32"
        return decided, [f"model.dtype: a product in bf16 takes {much}, as {slow}. Set model.dtype: fp32."]
    return decided, []


@dataclass(frozen=True)
class Needs:
    """The needs of a run on its machine. `config` is decided for that, and `about_type` has sentences on its type and
    on what is assumed of its base."""

    config: Config
    machine: Machine
    at_hand: AtHand
    plan: Plan
    about_type: list[str]


def description_for(config: Config, at_hand: AtHand) -> Description:
    """Return the base's description, with the activations of a tower that learns if its files are at hand."""
    if at_hand.directory and config.tuning.towers:
        return with_pictures_kept(config, resolve_base(config.model))
    return at_hand.description


def needs_of(config: Config, gpu: str | None, ranks_per_node: int | None) -> Needs:
    """Return what `config` needs, without a look at its data, its weights or the store. Raises as `plan_run`."""
    machine = machine_of(config, gpu, ranks_per_node)
    at_hand = base_at_hand(config.model)
    base = at_hand.description
    config, about_type = typed_for(config.decided(base.in_4_bits), machine, base)
    with suppress(CapstanError):  # unreadable data is reported where it is read
        config = with_labels(config)
    if at_hand.assumes_sight and ROW_KINDS[config.data.kind].sees:
        about_type = [*about_type, at_hand.assumes_sight]
    base = description_for(config, at_hand)
    at_hand = replace(at_hand, description=base)
    memory = machine.gpu.memory if machine.gpu else None
    plan = make_plan(config, base, machine.world_size, machine.per_node, memory, machine.host_memory)
    return Needs(config, machine, at_hand, plan, about_type)


def plan_run(
    config: Config,
    gpu: str | None,
    ranks_per_node: int | None,
    gpu_hours_between_failures: float = GPU_HOURS_BETWEEN_FAILURES,
    store_rate: float | None = None,
) -> Planned:
    """Plan `config` for `gpu`, a size or a name.

    The default is the GPU of cluster.slurm.gpu_type, else this machine's. On average a failure comes after so many GPU
    hours. The base's place gives all ranks together `store_rate` bytes a second, if that is known.

    Raises:
        ConfigError: the GPU is unknown, or the base or a method cannot be planned with.
    """
    needs = needs_of(config, gpu, ranks_per_node)
    config, machine, at_hand, checked = needs.config, needs.machine, needs.at_hand, _checked(needs)
    plan, model, files = checked.plan, at_hand.description.architecture, at_hand.directory
    with patiently("asking the store"):
        store = _answering_store(config)
    with patiently("measuring the data"):
        epoch = None if checked.missing else epoch_length(config, files, store)
        length = length_of(config, epoch)
    features = pictures = None
    if keeps_features(config, model):
        if checked.values is not None:
            size = ceil(value_bytes(config) * model.hidden * checked.values)
            features = FeatureBytes(size, compiled_pictures(config, files, store))
    elif files and not plan.mismatches:
        pictures = _picture_work(config, plan, machine, epoch)
    rate = _rate_for(config, plan, machine, model, store, pictures)
    if not resizes(config) and (empty := empty_rows(config, plan.batch.world_size)):
        plan = replace(plan, mismatches=[*plan.mismatches, empty], shortfalls=[*plan.shortfalls, empty])
    ranks = min(machine.per_node, machine.world_size)
    told = notes_of(config, plan, model, Known(length, epoch, features, pictures, rate), ranks)
    plan = replace(plan, notes=[*plan.notes, *filter(None, told)])
    estimate = forecast(config, plan.batch, length, rate, config.cluster.spares * ranks)
    with patiently("looking for a start of a run of the store from this base"):
        past = past_starts(store, config) if store is not None else []
    step_seconds = estimate.step_seconds if estimate else None
    phases = partial(estimated_phases, config, at_hand, plan, machine.per_node, step_seconds, store_rate)
    start, expected = start_time(past, phases, machine.world_size), None
    if estimate and plan.device == "gpu":
        times = (estimate.step_seconds, estimate.seconds)
        expected = restarts(start, machine.world_size, *times, config.checkpoint, gpu_hours_between_failures)
    return Planned(
        plan,
        machine.gpu,
        machine.whose,
        length,
        estimate,
        data_missing=bool(checked.missing),
        start=start,
        no_exports=checked.exports,
        restarts=expected,
        pictures=pictures,
        features=features,
    )


class _Checked(NamedTuple):
    """A plan with what is wrong with the run, as far as files at hand tell.

    `missing` says which data is not there. `values` is how many hidden states a token of a picture has features of,
    where that is known. `exports` are sentences about exports that the run cannot have.
    """

    plan: Plan
    missing: list[str]
    values: float | None
    exports: list[str]


def _checked(needs: Needs) -> _Checked:
    config, plan, at_hand = needs.config, needs.plan, needs.at_hand
    missing, misfits, values = unusable(config.data), list[str](), None
    try:
        left_out = check_weights_at_hand(config.model)
        values = check_sight_at_hand(config, keeps=keeps_features(config, at_hand.description.architecture))
        plan = replace(plan, left_out=[] if ROW_KINDS[config.data.kind].sees else left_out)
    except ConfigError as error:
        misfits.append(str(error))
    if at_hand.directory and not missing and not any(is_of_hub(source) for source in config.data.train):
        try:
            with patiently("looking into the files of the data"):
                check_sources(config, at_hand.directory)
        except ConfigError as error:
            misfits.append(str(error))
        except DataError as error:
            missing.append(str(error))
        except StorageError:
            pass  # the data's bucket may be out of reach from here
    wrong, short = [*plan.mismatches, *misfits], [*plan.shortfalls, *misfits, *missing]
    notes = [*([at_hand.said] if at_hand.said else []), *needs.about_type, *plan.notes]
    exports = list[str]()
    if at_hand.directory and not wrong:
        try:
            check_asked_exports(config)
            exports = export_notes(refused_exports(config))
        except ConfigError as error:
            wrong, short = [*wrong, str(error)], [*short, str(error)]
    return _Checked(replace(plan, mismatches=wrong, shortfalls=short, notes=notes), missing, values, exports)


def _rate_for(
    config: Config,
    plan: Plan,
    machine: Machine,
    model: Architecture,
    store: Store | None,
    pictures: PictureWork | None,
) -> Rate | None:
    """Return the rate of a run of the store that did such work, else the one assumed for the GPU, if it is known."""
    by_size = machine.gpu is not None and not machine.gpu.name
    with patiently("looking for a run of the store that did such work"):
        rate = None if by_size or store is None else measured_rate(store, config, machine.gpu)
    if rate is None and machine.gpu and plan.device == "gpu":
        again, ranks = plan.recomputed_layers / plan.layers, min(machine.per_node, machine.world_size)
        nodes = ceil(machine.world_size / ranks)
        gathers = GatherTraffic(plan.traffic_per_step, plan.batch.accumulation, nodes, ranks)
        rate = assumed_rate(config, model, machine.gpu, again, gathers, pictures)
    return rate


# As `launcher/cluster/slurm/submit.py` asks for them.
_CPUS_A_GPU = 8


def _picture_work(config: Config, plan: Plan, machine: Machine, epoch: EpochLength | None) -> PictureWork | None:
    """Return what the pictures, videos and sounds of the run's data cost, or before it is compiled a picture of a usual
    size."""
    if not ROW_KINDS[config.data.kind].sees or (epoch and epoch.compiled and not epoch.pictures):
        return None
    slurm = config.cluster.slurm
    usual = _CPUS_A_GPU * machine.per_node if slurm.gpus_per_node else len(os.sched_getaffinity(0))
    readers = max(1, picture_readers(slurm.cpus_per_node or usual, machine.per_node))
    works, base, again = list[PictureWork](), resolve_base(config.model), plan.recomputed_layers > 0
    for found in (epoch.pictures if epoch else ()) or (None,):
        sizes = found.sizes if found else (usual_size(config.data.images),)
        costs = costs_of(config, base, sizes, found.modality if found else 0)
        tokens, seconds = sum(cost.tokens for cost in costs), sum(cost.seconds for cost in costs)
        counted_ones = [cost.operations + again * cost.repeated for cost in costs if cost.operations is not None]
        operations = sum(counted_ones) / tokens if len(counted_ones) == len(costs) else None
        share, mean = (found.share, found.tokens) if found else (None, tokens / len(costs))
        smaller_by = numbered(found.modality if found else 0).smaller_by
        works.append(PictureWork(sizes, share, mean, operations, seconds / tokens, readers, costs[0].of, smaller_by))
    return together(works)


def _answering_store(config: Config) -> Store | None:
    """Return the run's store; None if it does not answer, so that only one request waits for it."""
    store = open_store(config.run.store, retry_seconds=0.0, request_seconds=_STORE_SECONDS)
    try:
        store.exists(f"{config.run.name}/{layout.CONFIG}")
    except StorageError:
        return None
    return store


def _gpu_of(config: Config, given: str | None) -> tuple[Gpu | None, Whose | None, int]:
    """Return the GPU that is planned for, why that one, and how many of them this machine has."""
    if given is not None:
        return read_gpu(given, "--gpu"), "given", 0
    if config.cluster.gpus_per_worker == 0:
        return None, None, 0
    wanted = config.cluster.slurm.gpu_type
    if wanted and (known := find_gpu(wanted)):
        return known, "cluster.slurm.gpu_type", 0
    local = [] if config.cluster.slurm.gpus_per_node else described_gpus()
    if not local:
        return None, None, 0
    smallest = min(local, key=lambda gpu: gpu.memory)
    known = find_gpu(smallest.name)
    peaks = (known.flops, known.bandwidth) if known else (None, None)
    here = Gpu(smallest.name, smallest.memory, *peaks, bf16=why_slow(config.cluster.gpus_per_worker) is None)
    return here, "this machine", len(local)


def _ranks(config: Config, local_gpus: int, ranks_per_node: int | None) -> tuple[int, int]:
    """Return the ranks of the run and those of a node.

    They are as the settings say, else one for each GPU that is known of, else as few as can be.
    """
    slurm = config.cluster.slurm
    serving = config.rollout.serving_gpus
    asked = config.cluster.most_workers or max(0, slurm.nodes * (slurm.gpus_per_node or 0) - serving)
    world_size = asked or max(0, local_gpus - serving) or config.sharding.sequence_parallel
    return world_size, ranks_per_node or min(world_size, slurm.gpus_per_node or world_size)
