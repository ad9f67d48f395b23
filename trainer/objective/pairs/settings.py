"""The settings of the section `objective` that single losses of a pair declare."""

from trainer.objective.pairs import losses
from trainer.registry import kinds

SETTINGS = tuple(loss.settings for loss in kinds(losses, "PAIR_LOSSES").values() if loss.settings)
