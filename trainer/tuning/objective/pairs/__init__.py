"""The objectives over pairs of answers. They differ in the loss of a pair; losses/ has one file for each.

Their settings are those that the losses declare.
"""

from trainer.config.registry import kinds

SETTINGS = tuple(
    loss.settings for loss in kinds("trainer.tuning.objective.pairs.losses", "PAIR_LOSSES").values() if loss.settings
)
