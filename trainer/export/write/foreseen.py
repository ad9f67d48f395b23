"""An export is looked at before anything is learnt: it has names and shapes, and no values yet."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from trainer.base.architecture import Architecture
from trainer.base.base import Base
from trainer.base.load.load import DTYPES
from trainer.base.rows.parameters import find_all_weights
from trainer.config import Config
from trainer.export.write.decoded import as_plain
from trainer.export.write.merged import ChangesOf, files_with
from trainer.state.checkpoint.learnt_weights import LearntWeights
from trainer.tuning.method import method_of

_RANK = 2  # some starts (`tuning.init`) need an even rank
_MOST = 2**28
"""The most elements of a sample adapter. A larger one is not made; then only the export itself can tell."""


def check_layout(config: Config, base: Base, changes_of: ChangesOf | None = None) -> None:
    """Raise `ConfigError` if the files hold what a merge would change in a layout that no merge can change.

    With `changes_of` the merge keeps the base's codes.
    """
    written, method = base if changes_of else as_plain(base), method_of(config)
    shapes = _Shapes(method.shapes(written.architecture))
    files_with(written, find_all_weights(written), method.updates(shapes, written.architecture), changes_of)


@dataclass(frozen=True, eq=False, init=False)
class _Shapes(LearntWeights):
    """Weights of these shapes on `meta`, which no checkpoint holds yet."""

    shapes: Mapping[str, tuple[int, ...]]

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        object.__setattr__(self, "shapes", shapes)

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        return {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}


def sample_adapter(config: Config, architecture: Architecture) -> Mapping[str, bytes] | None:
    """Return the files of an adapter of zeros as the run will export it, but of a small rank. None if it is large.

    The names in it do not depend on the rank.
    """
    small = {name: _RANK for name in ("rank", "experts_rank") if getattr(config.tuning, name)}
    if "rank" in method_of(config).settings:
        config = config.model_copy(update={"tuning": config.tuning.model_copy(update=small)})
    method = method_of(config)
    shapes = method.shapes(architecture)
    if sum(map(prod, shapes.values())) > _MOST:
        return None
    zeros = {name: torch.zeros(shape, dtype=DTYPES[config.model.dtype]) for name, shape in shapes.items()}
    return method.export(zeros, config.model).files
