"""The settings of the section `objective` that single losses of a pair declare."""

from trainer.config.registry import kinds

SETTINGS = tuple(
    loss.settings for loss in kinds("trainer.tuning.objective.pairs.losses", "PAIR_LOSSES").values() if loss.settings
)
