"""Sentences of a plan: facts that a person should know of a run before it begins, beside its figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.filesize import decimal

from trainer.base.architecture import Architecture
from trainer.base.find.media import modalities
from trainer.config import Config
from trainer.config.objective import OWN, SERVE
from trainer.data.compile.length import EpochLength
from trainer.errors import ConfigError, counted
from trainer.evaluate.rollout.rewards import check_reward
from trainer.plan.forecast import Length, PictureWork, Rate
from trainer.plan.inputs import value_bytes
from trainer.plan.needs import Plan
from trainer.plan.resolve import tower_bytes
from trainer.tuning.linear_adapters import LowRank
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective
from trainer.tuning.objective.rollouts import LearnsFromRollouts
from trainer.tuning.objective.teacher import Teacher, teacher_of

if TYPE_CHECKING:
    from trainer.data.dataset.pictures import DifferentPictures

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
# From this share of a row's time on, reading its pictures is what takes the time.
_READING = 0.95


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


def resizes(config: Config) -> bool:
    """Whether a run shrinks and grows, with any number of ranks in between."""
    return config.cluster.fewest_workers != config.cluster.most_workers


class Known(NamedTuple):
    """The facts of a plan besides the memory: the length of the data, what pictures cost, and the rate."""

    length: Length
    epoch: EpochLength | None
    features: FeatureBytes | None
    pictures: PictureWork | None
    rate: Rate | None


def notes_of(config: Config, plan: Plan, model: Architecture, known: Known, ranks: int) -> Iterator[str | None]:
    """Yield sentences that a person should know of this run, or None. A node has so many `ranks`."""
    length, epoch, features, pictures, rate = known
    objective = find_objective(config)
    sampled = isinstance(objective, LearnsFromRollouts)
    if features:
        yield _of_features(config, model, features)
    if config.tuning.towers and model.kept_of_pictures is None:
        yield (
            f"tuning.towers: {config.tuning.towers}: the tower keeps activations for its backward pass, which"
            " the memory above does not count. If they do not fit, lower data.sequence_length, or what makes files"
            f" smaller ({', '.join(setting for one in modalities() for setting in one.smaller_by)})."
        )
    if teacher := teacher_of(objective):
        yield _of_teacher(teacher, model.vocabulary, length)
    if not sampled and (length.epochs or 0) >= _MANY_EPOCHS:
        yield _of_epochs(config, length)
    if not sampled and epoch:
        yield _of_last_step(config, epoch)
    if resizes(config):
        yield empty_rows(config, plan.batch.world_size)
    yield _of_large_batch(config, plan)
    if config.cluster.spares:
        yield _of_spares(config, plan, ranks)
    if pictures and rate:
        yield _of_reading(config, pictures, rate)
    if sampled:
        yield _of_rollouts(config, plan, rate)
        yield _of_reward(config)


def _of_reading(config: Config, pictures: PictureWork, rate: Rate) -> str | None:
    """Return a sentence on the host's cores, if they read the files of a row no faster than the rank learns."""
    taken = pictures.host_seconds_of_row(config.data.sequence_length)
    if taken < _READING * rate.seconds_a_row:
        return None
    smaller = f", or lower {' or '.join(pictures.smaller_by)}" if pictures.smaller_by else ""
    return (
        f"{pictures.noun}: the host's cores are the limit. {counted(pictures.cores, 'core')} of each rank"
        f" need{'s' if pictures.cores == 1 else ''} {1e3 * taken:.3g} ms for the {pictures.noun} of a row, and without"
        f" them a row would take less. Give each rank more cores (cluster.slurm.cpus_per_node){smaller}."
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


def empty_rows(config: Config, world_size: int) -> str | None:
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
    if world_size >= _MANY_RANKS and (empty := empty_rows(config, world_size)):
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
        f"sharding.tower_limit: the tower (encoder and projector) takes {tower:.3g} GiB, more than"
        f" {config.sharding.tower_limit:g}. So features of pictures are kept in run.store,"
        f" {decimal(features.a_token)} for each token of a picture: {most}."
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


def _of_reward(config: Config) -> str | None:
    """Return a sentence on a reward that is not found here, where the run may not be meant to start."""
    try:
        check_reward(config.rollout)
    except ConfigError as error:
        return f"{error} A start from another place may find it."
    return None


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
