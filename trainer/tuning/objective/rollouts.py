"""The interface of an objective that learns from sampled answers, and the checks of a run's rollout settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from trainer.tuning.objective import Objective
from trainer.tuning.objective.teacher import Teacher

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trainer.config import Config
    from trainer.tuning.method import Method


@runtime_checkable
class LearnsFromRollouts(Objective, Protocol):
    """An objective that reads the sampler's log p of each target, and its advantage, from the column `sampled`."""

    @property
    def judge(self) -> Teacher | None:
        """The teacher whose log-probabilities of each answer the model learns from; None if there is no teacher."""
        ...

    def advantages(self, rewards: NDArray[Any], gaps: Sequence[Sequence[float]] | None) -> Sequence[Any]:
        """The advantage of each answer, or of each of its tokens, in the order of `rewards` (prompts, answers).

        `gaps` is the judge's log p of each token minus the sampler's, in nats. It is None if the judge is not a server:
        such a judge scores the answers after they are committed."""
        ...


_ALIKE = 0.015
"""Nats a token by which sampler and trainer differ at most in the mean, with one adapter over one base: 0.004 in bf16,
0.008 in a mixture of experts, and 0.026 where a base in 4 bits is served in 16."""


def unlike_sampler(record: Mapping[str, Any]) -> str | None:
    """A sentence if an update's record shows that another model sampled its answers.

    The adapter with which the update begins should have sampled them.
    """
    gap = record.get("log_ratio", 0.0)
    if record.get("lag") != 0 or gap <= _ALIKE:
        return None
    return (
        f"rollout.engine: the sampler's log-probabilities differ from the trainer's by {gap:.3f} nats a token, with the"
        " same adapter, so its base is not the one that is trained. The ratio weighs that; better serve the base as"
        " quant.type and model.dtype have it."
    )


def rollout_identity(config: Config, objective: Objective) -> dict[str, Any]:
    """The rollout settings that must equal a checkpoint's to resume from it; none for an objective without rollouts."""
    if not isinstance(objective, LearnsFromRollouts):
        return {}
    # A checkpoint that was written before this setting existed has one update.
    updates = ("updates",) if config.rollout.updates > 1 else ()
    names = ("reward", "answers", "max_tokens", "temperature", *updates)
    return {f"rollout.{name}": getattr(config.rollout, name) for name in names}


def rollout_mismatches(config: Config, objective: Objective, method: Method) -> list[str]:
    """One sentence for each setting that rollouts do not allow, or that has no effect without rollouts."""
    if isinstance(objective, LearnsFromRollouts):
        return list(_mismatches(config, method))
    given, name = config.rollout, config.objective.name
    fields = type(given).model_fields.items()
    unread = [key for key, field in fields if getattr(given, key) != field.default]
    return [f"rollout.{key}: has no effect with objective.name: {name}. Remove it." for key in unread[:1]]


def _mismatches(config: Config, method: Method) -> Iterator[str]:
    """One sentence for each setting that does not suit a run whose rows are sampled.

    Sampled rows belong to no epoch, and each has one prompt and one answer."""
    from trainer.config.objective import OWN, SERVE, Serve

    given, name = config.rollout, f"objective.name: {config.objective.name}"
    if given.reward is None:
        yield f"rollout.reward: {name} has each answer rewarded. Give {', '.join(REWARDS)}, or module:function."
    elif "" in given.reward.partition(":") and given.reward not in REWARDS:
        yield f"rollout.reward: {given.reward!r} is not allowed. Allowed are {', '.join(REWARDS)}, or module:function."
    if given.engine == OWN and given.max_lag is not None:
        yield "rollout.max_lag: has no effect with rollout.engine: own, which samples and trains in turns. Remove it."
    if given.engine != OWN and method.exports_model:
        yield (
            f"rollout.engine: servers take adapters, and tuning.method: {config.tuning.method} has none. Set it to own."
        )
    if given.engine != OWN and method.through:
        yield (
            "rollout.engine: servers put the adapter beside the base, but tuning.through: stored trains it within the"
            " base's codes, so their answers would be those of another model. Set it to own."
        )
    if given.engine != SERVE and given.serve != Serve():
        yield "rollout.serve: has no effect without rollout.engine: serve. Set that, or remove it."
    if given.max_tokens >= config.data.sequence_length:
        yield (
            f"rollout.max_tokens: {given.max_tokens} leaves no room for a prompt in data.sequence_length:"
            f" {config.data.sequence_length}. Change one of them."
        )
    if given.held_out and not (config.eval.every and (config.data.eval or config.data.held_out)):
        yield (
            "rollout.held_out: has no effect without eval.every, and data.eval or data.held_out. Set them, or"
            " remove it."
        )
    if config.train.steps is None:
        yield f"train.epochs: {name} has a step for the answers to train.global_batch prompts. Give train.steps."
    for setting, value in (
        ("eval.per_epoch", config.eval.per_epoch),
        ("checkpoint.per_epoch", config.checkpoint.per_epoch),
    ):
        if value:
            yield f"{setting}: {name} counts no epochs. Count steps."
    if config.sharding.sequence_parallel > 1:
        yield (
            f"sharding.sequence_parallel: {config.sharding.sequence_parallel} is not possible with {name}. Set it to 1."
        )
    if config.data.share_prefix:
        yield f"data.share_prefix: is not possible with {name}. Remove it."


REWARDS = ("exact", "regex", "math", "json_schema", "length")
"""The names that `rollout.reward` may have; trainer/evaluate/rollout/rewards.py has the functions."""
