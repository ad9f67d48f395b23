"""The settings of the section `objective` that single losses of a pair declare."""

from trainer.config.registry import kinds
from trainer.tuning.objective.pairs import losses

SETTINGS = tuple(loss.settings for loss in kinds(losses, "PAIR_LOSSES").values() if loss.settings)
