"""Puts a plan together: the run's needs, the GPUs that it is meant for, its length, its time and its cost."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.filesize import decimal

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
from trainer.base.find.check import check_sight_at_hand, check_weights_at_hand, picture_costs
from trainer.base.find.locate import AtHand, base_at_hand, resolve_base
from trainer.config import Config
from trainer.config.objective import OWN, SERVE
from trainer.config.paths import local_path
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.compile.inputs import check_sources, with_labels
from trainer.data.compile.length import EpochLength, compiled_pictures, epoch_length
from trainer.data.source.files import is_of_hub, unusable
from trainer.errors import CapstanError, ConfigError, DataError, DoesNotFit, StorageError, counted
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
)
from trainer.plan.gpus import Gpu, find_gpu, read_gpu
from trainer.plan.inputs import value_bytes
from trainer.plan.needs import Plan
from trainer.plan.plan import make_plan
from trainer.plan.resolve import keeps_features, tower_bytes, typed
from trainer.processes.bf16 import slowdown_words, why_processor_is_slow, why_slow
from trainer.processes.devices import described_gpus, host_memory_left, local_gpus, picture_readers
from trainer.processes.helper_thread import patiently
from trainer.run import layout
from trainer.run.folder import name_of, run_config
from trainer.run.records import Record, edge_records, starts_in
from trainer.run.segments import streams
from trainer.store.store import Store, open_store
from trainer.tuning.linear_adapters import LowRank
from trainer.tuning.method import method_of
from trainer.tuning.objective.objective import find_objective
from trainer.tuning.objective.rollouts import LearnsFromRollouts
from trainer.tuning.objective.teacher import Teacher, teacher_of

if TYPE_CHECKING:
    from trainer.data.dataset.pictures import DifferentPictures

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
    model, train, base = config.model, config.train, config.model.base
    if "://" not in base and (path := local_path(base, "model.base")).exists():
        base = str(path)  # as in a run's own configuration, wherever it was started
    return [
        (base, model.layers, model.dtype, config.quant.type),
        (config.tuning.method, config.tuning.targets, config.tuning.experts, config.objective.name),
        (config.data.sequence_length, train.micro_batch, train.activation_checkpointing),
        (config.sharding.sequence_parallel, ROW_KINDS[config.data.kind].sees),
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
_MANY_EPOCHS = 20
# In an epoch of more steps than this, one small step changes little.
_FEW_STEPS = 20
# The share of a row that is empty where its few tokens are worth a word.
_MOSTLY_EMPTY = 0.6
# The share of a step's rows that may be empty without a word.
_SOME_EMPTY = 0.1
_MANY_RANKS = 16
_LARGE_BATCH = 256
"""From this many rows on, the loss of adapters falls behind that of full fine-tuning."""

Whose = Literal["given", "cluster.slurm.gpu_type", "this machine"]


@dataclass(frozen=True)
class FeatureBytes:
    """The bytes of the features that are kept for each token of a picture, and the `pictures` of the training data.
    Those are None before the data is compiled."""

    a_token: int
    pictures: "DifferentPictures | None"

    @property
    def bytes(self) -> int | None:
        return None if self.pictures is None else self.a_token * self.pictures.tokens

    def to_json(self) -> dict[str, Any]:
        found = self.pictures
        return {"bytes_a_token": self.a_token, "documents": found and found.documents, "bytes": self.bytes}


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
    """The needs of a run on its machine. `config` is decided for that, and `about_type` has sentences on its type."""

    config: Config
    machine: Machine
    at_hand: AtHand
    plan: Plan
    about_type: list[str]


def needs_of(config: Config, gpu: str | None, ranks_per_node: int | None) -> Needs:
    """Return what `config` needs, without a look at its data, its weights or the store. Raises as `plan_run`."""
    machine = machine_of(config, gpu, ranks_per_node)
    at_hand = base_at_hand(config.model)
    base = at_hand.description
    config, about_type = typed_for(config.decided(base.in_4_bits), machine, base)
    with suppress(CapstanError):  # unreadable data is reported where it is read
        config = with_labels(config)
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
        pictures = _picture_work(config, machine, epoch)
    rate = _rate_for(config, plan, machine, model, store, pictures)
    if not _resizes(config) and (empty := _of_empty_rows(config, plan.batch.world_size)):
        plan = replace(plan, mismatches=[*plan.mismatches, empty], shortfalls=[*plan.shortfalls, empty])
    ranks = min(machine.per_node, machine.world_size)
    told = _notes(config, plan, model, _Known(length, epoch, features, pictures, rate), ranks)
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


def _resizes(config: Config) -> bool:
    """Whether a run shrinks and grows, with any number of ranks in between."""
    return config.cluster.fewest_workers != config.cluster.most_workers


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


class _Known(NamedTuple):
    """The facts of a plan besides the memory: the length of the data, what pictures cost, and the rate."""

    length: Length
    epoch: EpochLength | None
    features: FeatureBytes | None
    pictures: PictureWork | None
    rate: Rate | None


def _notes(config: Config, plan: Plan, model: Architecture, known: _Known, ranks: int) -> Iterator[str | None]:
    """Yield sentences that a person should know of this run, or None. A node has so many `ranks`."""
    length, epoch, features, pictures, rate = known
    objective = find_objective(config)
    sampled = isinstance(objective, LearnsFromRollouts)
    if features:
        yield _of_features(config, model, features)
    if teacher := teacher_of(objective):
        yield _of_teacher(teacher, model.vocabulary, length)
    if not sampled and (length.epochs or 0) >= _MANY_EPOCHS:
        yield _of_epochs(config, length)
    if not sampled and epoch:
        yield _of_last_step(config, epoch)
    if _resizes(config):
        yield _of_empty_rows(config, plan.batch.world_size)
    yield _of_large_batch(config, plan)
    if config.cluster.spares:
        yield _of_spares(config, plan, ranks)
    if pictures and rate:
        yield _of_reading(config, pictures, rate)
    if sampled:
        yield _of_rollouts(config, plan, rate)


_UNKNOWN_SIZE = (1024, 1024)
# From this share of a row's time on, reading its pictures is what takes the time.
_READING = 0.95
# As `launcher/cluster/slurm/submit.py` asks for them.
_CPUS_A_GPU = 8


def _picture_work(config: Config, machine: Machine, epoch: EpochLength | None) -> PictureWork | None:
    """Return what the pictures of the run's data cost, or before it is compiled a picture of a usual size."""
    if not ROW_KINDS[config.data.kind].sees:
        return None
    from trainer.data.format.known.pictures.sources import limited  # which needs the packages that read pictures

    found = epoch.pictures if epoch else None
    if epoch and epoch.compiled and found is None:
        return None
    sizes = found.sizes if found else (limited(_UNKNOWN_SIZE, config.data.images),)
    costs = picture_costs(resolve_base(config.model), sizes)
    tokens, seconds = sum(cost.tokens for cost in costs), sum(cost.seconds for cost in costs)
    counted_ones = [cost.operations for cost in costs if cost.operations is not None]
    operations = sum(counted_ones) / tokens if len(counted_ones) == len(costs) else None
    slurm = config.cluster.slurm
    usual = _CPUS_A_GPU * machine.per_node if slurm.gpus_per_node else len(os.sched_getaffinity(0))
    readers = max(1, picture_readers(slurm.cpus_per_node or usual, machine.per_node))
    mean = found.tokens if found else tokens / len(costs)
    return PictureWork(sizes, found.share if found else None, mean, operations, seconds / tokens, readers)


def _of_reading(config: Config, pictures: PictureWork, rate: Rate) -> str | None:
    """Return a sentence on the host's cores, if they read the pictures of a row no faster than the rank learns."""
    taken = pictures.host_seconds_of_row(config.data.sequence_length)
    if taken < _READING * rate.seconds_a_row:
        return None
    return (
        f"data.images: the host's cores are the limit. {counted(pictures.cores, 'core')} of each rank"
        f" need{'s' if pictures.cores == 1 else ''} {1e3 * taken:.3g} ms for the pictures of a row, and without them a"
        " row would take less. Give each rank more cores (cluster.slurm.cpus_per_node), or lower"
        " data.images.max_pixels."
    )


def _of_spares(config: Config, plan: Plan, ranks_per_node: int) -> str:
    """Return a sentence on the machines that the run asks for and that have no ranks."""
    spares, needed = config.cluster.spares, ceil(plan.batch.world_size / ranks_per_node)
    gpus = f" with {counted(ranks_per_node, 'GPU')} each" if plan.device == "gpu" else ""
    counts = ". GPU hours and cost count them" if plan.device == "gpu" else ""
    return (
        f"spares: the run asks for {counted(needed + spares, 'machine')}{gpus}, {needed} for its ranks and {spares}"
        f" that wait (cluster.spares){counts}"
    )


def _of_epochs(config: Config, length: Length) -> str:
    """Return a sentence on many passes over little data."""
    name = "train.epochs" if config.train.epochs else "train.steps"
    return (
        f"{name}: {length.epochs or 0:,.0f} passes over the data. After a few the model knows the rows by heart, and"
        " the loss on other rows rises. Lower it, or give more rows; eval.per_epoch and checkpoint.keep_best keep the"
        " best."
    )


def _of_empty_rows(config: Config, world_size: int) -> str | None:
    """Return a sentence on the rows that a step computes for nothing, if they are many."""
    rows = config.train.global_batch
    at_once = max(1, world_size // config.sharding.sequence_parallel) * config.train.micro_batch
    computed = ceil(rows / at_once) * at_once
    if computed - rows <= _SOME_EMPTY * computed:
        return None
    fewer = computed - at_once
    shorter = f", and {fewer} in {fewer / computed:.0%} of it" if fewer else ", and so do fewer ranks for these rows"
    return (
        f"train.global_batch: a step computes {computed} rows on {counted(world_size, 'rank')}, of which"
        f" {computed - rows} ({(computed - rows) / computed:.0%}) are empty. train.global_batch: {computed} takes the"
        f" same time{shorter}."
    )


def refuse_empty_rows(config: Config, world_size: int) -> None:
    """Raise `ConfigError` if a run begins on so many ranks that more than a tenth of what they compute is for nothing.

    A run that goes on is not refused: it may have lost machines since. Nor is one on few ranks, of which `plan` tells.
    """
    if world_size >= _MANY_RANKS and (empty := _of_empty_rows(config, world_size)):
        raise ConfigError(empty)


def _of_large_batch(config: Config, plan: Plan) -> str | None:
    """Return a sentence on what a large batch does to adapters of low rank."""
    if not isinstance(method_of(config), LowRank) or config.train.global_batch < _LARGE_BATCH:
        return None
    return (
        f"train.global_batch: {config.train.global_batch} rows ({plan.batch.tokens:,} tokens) an update. Adapters of"
        " low rank learn less from the same rows in large batches than full fine-tuning does, whatever their rank"
        f" (LoRA Without Regret, 2025). Fewer ranks, or below {_LARGE_BATCH} rows, learn more from each row."
    )


def _of_last_step(config: Config, epoch: EpochLength) -> str | None:
    """Return a sentence on an update of each epoch that learns from much less than the others, if it counts for much.

    The rows of an epoch are known once they are packed. The last step takes what is left of them. At a batch of one row
    each row is an update, and packing leaves about all of the room that the rows have together in one of them.
    """
    batch = config.train.global_batch
    rows = epoch.bins[0] if epoch.bins else 0
    steps, left = ceil(rows / batch), rows % batch
    if not 1 < steps <= _FEW_STEPS:
        return None
    name = "train.global_batch"
    if 0 < left < batch / 2:
        near = sorted(range(batch // 2, 2 * batch), key=lambda size: abs(size - batch))
        better = next((size for size in near if not 0 < rows % size < size / 2), None)
        return (
            f"{name}: an epoch has {counted(rows, 'row')}, so the last of its {counted(steps, 'step')} learns from"
            f" {left} of {batch} and is an update like the others."
            + (f" {name}: {better} divides them more evenly." if better else "")
        )
    filled = epoch.tokens / config.data.sequence_length
    if batch == 1 and config.data.packing and rows - filled > _MOSTLY_EMPTY:
        return (
            f"{name}: 1 makes each of an epoch's {counted(rows, 'row')} an update, and their tokens fill only"
            f" {filled:.1f} of them: the emptiest counts as much as a full one. A larger {name} evens that out."
        )
    return None


def _of_features(config: Config, model: Architecture, features: FeatureBytes) -> str:
    """Return a sentence on the features of pictures that the store takes, which are computed before the first step."""
    found, tower = features.pictures, tower_bytes(config, model) / 2**30
    most = "how many there are is known once the data is compiled"
    if found is not None:
        documents = counted(found.documents, "document")
        most = f"about {decimal(features.bytes or 0)} for the pictures of {documents} of data.train"
    return (
        f"sharding.tower_limit: the part that sees takes {tower:.3g} GiB, more than {config.sharding.tower_limit:g}. So"
        f" features of pictures are kept in run.store, {decimal(features.a_token)} for each token of a picture: {most}."
        " They are computed once, before the first step, and the run has no tower in memory."
    )


def _of_teacher(teacher: Teacher, vocabulary: int, length: Length) -> str:
    """Return a sentence on what the teacher stores.

    Not all tokens are targets, so the tokens of an epoch are a bound.
    """
    size = teacher.bytes_a_target(vocabulary)
    most = f", at most {decimal(size * length.tokens_of_epoch)} for an epoch's tokens" if length.tokens_of_epoch else ""
    return (
        f"{teacher.setting}: {teacher.name} stores {size} bytes a target beside the data{most}, by capstan teach before"
        " the run. The run has no teacher in memory."
    )


def _of_rollouts(config: Config, plan: Plan, rate: Rate | None) -> str:
    """Return sentences on what a step samples, who samples, how fast that has to be, and what the store takes.

    Each token of an answer takes 12 bytes there, and so does each token of its prompt.
    """
    given, batch = config.rollout, config.train.global_batch
    answers, adapter = batch * given.answers, f"an adapter at most {given.lag} updates old"
    who = f"{len(given.engine)} servers, with {adapter}"
    if given.engine == OWN:
        who = "the ranks themselves, between updates"
    elif given.engine == SERVE:
        who = f"{counted(given.serve.replicas, 'server')} that start with the run, with {adapter}"
    steps = "each step" if given.updates == 1 else f"one step of {given.updates}"
    most = decimal(12 * answers * config.data.sequence_length)
    served = ""
    if given.engine != OWN:
        size = decimal(plan.parameters.trainable * value_bytes(config))
        learnt = "" if rate is None else f", here {rate.tokens_per_second * plan.batch.data_groups:,.0f},"
        gpus = ""
        if plan.device == "gpu":
            base = decimal(plan.parameters.frozen * value_bytes(config))
            ranks = counted(plan.batch.world_size, "GPU")
            gpus = f" The ranks take {ranks}; each server needs others, for a base of {base} in {config.model.dtype}."
            if given.engine == SERVE:
                all_gpus = counted(plan.batch.world_size + given.serving_gpus, "GPU")
                gpus = (
                    f" The ranks take {ranks} and the servers {given.serving_gpus}, {all_gpus} together; each server"
                    f" has {counted(given.serve.gpus, 'GPU')} for a base of {base} in {config.model.dtype}, and what"
                    " vLLM keeps beside it."
                )
        share = "" if given.updates == 1 else f" 1/{given.updates}"
        served = (
            f"{gpus} After each update an adapter of {size} is published. The run waits for no answer where the servers"
            f" together sample{share} as many tokens a second as the ranks learn from{learnt} and rollout.max_lag is at"
            f" least {given.updates}."
        )
    return (
        f"rollout: {steps} samples {answers:,} answers, {given.answers} to each of {batch} prompts, of at most"
        f" {answers * given.max_tokens:,} tokens, by {who}. A step's are at most {most} in the store, until its"
        f" checkpoints are gone.{served}"
    )


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
