"""Rows that hold a prompt once for several answers (`data.share_prefix`): whether a run can have them, in a sentence for each reason why
not. No torch."""

from collections.abc import Iterator

from trainer.base.architecture import Architecture
from trainer.config import Config
from trainer.model.kernels.attention import KERNELS
from trainer.tuning.method import Method

_NAME = "data.share_prefix"


def kernels_without_masks(config: Config) -> dict[str, str]:
    """The kernels that cannot compute a run's rows, each with the reason as a clause."""
    if not config.data.share_prefix:
        return {}
    why = f"it knows borders of documents alone, and {_NAME} needs a mask"
    return {kernel.name: why for kernel in KERNELS if not kernel.masks}


def shared_prefix_mismatches(config: Config, model: Architecture, method: Method) -> list[str]:
    """A sentence for each setting that does not suit answers which share their prompt."""
    return list(_mismatches(config, model, method)) if config.data.share_prefix else []


def _mismatches(config: Config, model: Architecture, method: Method) -> Iterator[str]:
    kernel = config.model.attention
    if model.fails_prefix:
        yield f"{_NAME}: answers cannot share a prompt with this base, as {model.fails_prefix}. Remove it."
    if why := kernels_without_masks(config).get(kernel):
        yield f"model.attention: {kernel} cannot run with {_NAME}: {why}. Use auto."
    if method.virtual.count:
        yield f"{_NAME}: tuning.method: {config.tuning.method} has virtual tokens before each answer, which differ from the prompt's. Remove it."
