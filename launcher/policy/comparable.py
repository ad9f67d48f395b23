"""The metric of a sweep, and the settings that it may try under this metric.

Figures of trials compare only if all trials measure the same. A mean of nats depends on the tokens that it covers, and
a preference's loss on the formula. A trial that changes either is better or worse by definition, not by training.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trainer.config import Config
from trainer.config.evaluation import UNNAMED
from trainer.config.row_kinds import LIKELY
from trainer.config.sweep import TRAIN
from trainer.errors import ConfigError
from trainer.tuning.objective import find_objective

LOSS = "loss"
_BETTER_WHEN_HIGH = ("reward_accuracy", "reward_margin", "accuracy", "micro_f1", "macro_f1")
"""Measures that every objective which has them is after."""
_OF_NO_FORMULA = ("reward_accuracy", "accuracy", "micro_f1", "macro_f1")
"""Measures that mean the same whatever the objective's settings: a share of pairs."""
_KEEP_THE_TOKENS = ("data.train", "data.eval", "data.held_out", "data.held_out_seed", "data.packing")
"""Settings of the data that leave the tokens of a given document what they are."""
_WITH_DATA = ", or compare by data of its own, data.eval or one of eval.sets"
_ROWS_OF_A_STEP = ("run.seed", "train.steps", "train.epochs", "train.global_batch")
"""Settings that decide which rows the last steps are of, and how often these were learnt before."""
_REFERENCE = (
    "model.base",
    "model.revision",
    "model.layers",
    "model.dtype",
    "quant.type",
    "quant.block_size",
    "quant.double",
)
"""Settings of the base without what learns."""


class Metric(NamedTuple):
    """The figure `measure` of the records about `of`: the name of an evaluation set, or "train".

    `mode` says whether min or max is good.
    """

    of: str
    measure: str
    mode: str

    @property
    def name(self) -> str:
        return self.of if self.measure == LOSS else f"{self.of}/{self.measure}"


def metric_of(config: Config, trials: Sequence[Config]) -> Metric:
    """Return the metric by which the `trials` of the sweep of `config` are compared.

    Raises:
        ConfigError: not all of them record it, the mode contradicts it, or a setting that is tried changes what it
            measures.
    """
    sweep = config.sweep
    of, measure = sweep.judged_by(config.evaluated)
    recorded = [_measures(trial, of) for trial in trials]
    known = [name for name in recorded[0] if all(name in measures for measures in recorded)]
    if measure not in known:
        names = ", ".join(of if name == LOSS else f"{of}/{name}" for name in known)
        raise ConfigError(f"sweep.metric: {sweep.metric!r} is in no record of this run. Allowed for {of}: {names}.")
    metric = Metric(of, measure, sweep.mode or _mode(measure, sweep.metric))
    if metric.mode == "min" and measure in _BETTER_WHEN_HIGH:
        raise ConfigError(
            f"sweep.mode: min would choose the worst trial by {metric.name}. Set it to max, or remove it."
        )
    if wrong := [sentence for name in sweep.settings for sentence in _changes(name, metric, trials)]:
        raise ConfigError("\n".join(wrong))
    return metric


def _mode(measure: str, metric: str | None) -> str:
    if measure == LOSS:
        return "min"
    if measure in _BETTER_WHEN_HIGH:
        return "max"
    raise ConfigError(f"sweep.mode: missing. Say whether a low or a high {metric} is good: min or max.")


def _measures(config: Config, of: str) -> Sequence[str]:
    """Return the figures that the run records of a set. A named set has only its likelihood."""
    return (LOSS, *(find_objective(config).measures if of in (UNNAMED, TRAIN) else ()))


def _changes(name: str, metric: Metric, trials: Sequence[Config]) -> Iterator[str]:
    """Yield a sentence if trying the setting changes what the metric measures."""
    section = name.partition(".")[0]
    if section == "data" and _decides_tokens(name, metric.of, trials[0]):
        yield (
            f"sweep.settings: {name!r} changes the tokens that {metric.name} is a mean over, so the trials do not"
            f" compare. Remove it{_WITH_DATA if name in _KEEP_THE_TOKENS else ''}."
        )
    elif name == "eval.sets" and metric.of not in (UNNAMED, TRAIN):
        yield f"sweep.settings: 'eval.sets' changes the data that {metric.name} is measured on. Remove it."
    elif section == "objective" and metric.measure not in _OF_NO_FORMULA and _by_formula(metric, trials):
        yield (
            f"sweep.settings: {name!r} changes the formula of {metric.name}, so the trials do not compare. Remove it,"
            " or compare by another sweep.metric: eval/reward_accuracy of preferences, or the loss of one of"
            " eval.sets."
        )
    elif name == "objective.name" and metric.of in (UNNAMED, TRAIN) and len(set(map(_compares, trials))) > 1:
        yield (
            f"sweep.settings: 'objective.name' changes the formula of {metric.name}: some of these objectives compare"
            " answers with a reference, and others by themselves. Try those of one kind, or compare by the loss of one"
            " of eval.sets."
        )
    elif name in _REFERENCE and metric.of in (UNNAMED, TRAIN) and any(map(_compares, trials)):
        yield (
            f"sweep.settings: {name!r} changes the reference that {metric.name} compares with, so a better base is not"
            " seen. Remove it, or compare by the loss of one of eval.sets."
        )
    elif metric.of == TRAIN and name in _ROWS_OF_A_STEP:
        yield (
            f"sweep.settings: {name!r} changes the rows that the training loss is a mean over, and how often they were"
            f" learnt. Remove it{_WITH_DATA}."
        )
    elif metric.of == TRAIN and name == "tuning.dropout":
        yield (
            f"sweep.settings: {name!r} changes the model that the training loss is of, as evaluations are without"
            f" dropout. Remove it{_WITH_DATA}."
        )


def _decides_tokens(name: str, of: str, config: Config) -> bool:
    """Return whether a setting of the data decides which tokens the figures about `of` cover."""
    if name not in _KEEP_THE_TOKENS or of == TRAIN:
        return True
    return of == UNNAMED and name in (
        ("data.eval",) if config.data.eval else ("data.train", "data.held_out", "data.held_out_seed")
    )


def _compares(config: Config) -> bool:
    """Return whether the figures of the objective are differences from the base without what learns."""
    return find_objective(config).reads_reference


def _by_formula(metric: Metric, trials: Sequence[Config]) -> bool:
    """Return whether the figure is the objective's own, and no likelihood.

    Evaluations leave out what training adds to the likelihood.
    """
    if metric.of == TRAIN:
        return True
    return metric.of == UNNAMED and not all(set(find_objective(trial).formats) <= set(LIKELY) for trial in trials)
