"""A tower keeps activations for its backward pass if it learns. Its class measures them without weights.

The activations of a decoder layer follow from its linear layers (trainer/plan/memory.py). Those of a tower also depend
on how many patches become a token, which the class and its processor alone know.
"""

from contextlib import suppress
from dataclasses import replace

from trainer.base.base import Base, Description
from trainer.base.find.check import PictureCost, SeesAndLearns, picture_costs
from trainer.config import Config
from trainer.config.data import Images
from trainer.errors import ConfigError
from trainer.tuning.method import method_of

_USUAL_SIZE = (1024, 1024)


def usual_size(settings: Images) -> tuple[int, int]:
    """Height and width of a picture where nothing is known of those of the data."""
    return settings.limited(_USUAL_SIZE)


def costs_of(config: Config, base: Base, sizes: tuple[tuple[int, int], ...], modality: int = 0) -> list[PictureCost]:
    """Return what a picture of each height and width costs in the run, as `picture_costs`."""
    found = method_of(config).sees(base.architecture)
    if found is None:
        return picture_costs(base, sizes, modality=modality)
    attention = "eager" if config.model.attention == "eager" else "sdpa"
    learning = SeesAndLearns(dtype=config.model.dtype, attention=attention, **found)
    return picture_costs(base, sizes, learning, modality)


def with_pictures_kept(config: Config, base: Base) -> Description:
    """Return the base's description with `kept_of_pictures`, if the tower learns and they can be measured."""
    if config.tuning.towers is None:
        return base.description
    with suppress(ConfigError):  # a base without a processor, or a missing package, is refused elsewhere
        (cost,) = costs_of(config, base, (usual_size(config.data.images),))
        architecture = replace(base.architecture, kept_of_pictures=cost.kept)
        return replace(base.description, architecture=architecture)
    return base.description
