"""An export is looked at before anything is learnt: it has names and shapes, and no values yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from trainer.base.base import Base
from trainer.base.load.load import DTYPES
from trainer.base.rows.parameters import FoundWeights, find_all_weights
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.export.write.decoded import as_plain
from trainer.export.write.merged import ChangesOf, files_with
from trainer.export.write.recoded import choose
from trainer.model.held import Encoder
from trainer.state.checkpoint.learnt_weights import LearntWeights
from trainer.tuning.method import WeightUpdate, method_of

_RANK = 2  # some starts (`tuning.init`) need an even rank
_MOST = 2**28
"""The most elements of a sample adapter. A larger one is not made; then only the export itself can tell."""


@dataclass(frozen=True, eq=False)
class Foreseen:
    """A run by `config` over `base`, before it learns.

    The formats that are asked about it share one, because finding the weights of a large base takes seconds.
    """

    config: Config
    base: Base

    @cached_property
    def plain(self) -> Base:
        """The base as a merge writes it, in 16 or 32 bits."""
        return as_plain(self.base)

    @cached_property
    def weights(self) -> FoundWeights:
        """The weights of `plain`."""
        return find_all_weights(self.plain)

    def check_layout(self) -> None:
        """Raise `ConfigError` if the files hold what a merge would change in a layout that no merge can change."""
        if self._refused is not None:
            raise self._refused

    @cached_property
    def _refused(self) -> ConfigError | None:
        try:
            files_with(self.plain, self.weights, self._updates)
        except ConfigError as refused:
            return refused
        return None

    def check_codes(self, changes_of: ChangesOf) -> None:
        """The same for a merge that keeps the base's codes, whose changes are those of `changes_of`."""
        weights = self.weights if self.plain is self.base else find_all_weights(self.base)
        files_with(self.base, weights, self._updates, changes_of)

    def check_code(self, code: Encoder) -> None:
        """Raise `ConfigError` if transformers cannot have the layers of the merged model in this code."""
        choose(self.plain, code, self.weights)

    @property
    def _updates(self) -> Mapping[str, WeightUpdate]:
        method, architecture = method_of(self.config), self.base.architecture
        return method.updates(_Shapes(method.shapes(architecture)), architecture)

    def sample_adapter(self) -> Mapping[str, bytes] | None:
        """Return the files of an adapter of zeros as the run will export it, but of a small rank. None if it is large.

        The names in it do not depend on the rank.
        """
        config, architecture = self.config, self.base.architecture
        small = {name: _RANK for name in ("rank", "experts_rank") if getattr(config.tuning, name)}
        if "rank" in method_of(config).settings:
            config = config.model_copy(update={"tuning": config.tuning.model_copy(update=small)})
        method = method_of(config)
        shapes = method.shapes(architecture)
        if sum(map(prod, shapes.values())) > _MOST:
            return None
        zeros = {name: torch.zeros(shape, dtype=DTYPES[config.model.dtype]) for name, shape in shapes.items()}
        return method.export(zeros, config.model).files


@dataclass(frozen=True, eq=False, init=False)
class _Shapes(LearntWeights):
    """Weights of these shapes on `meta`, which no checkpoint holds yet."""

    shapes: Mapping[str, tuple[int, ...]]

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        object.__setattr__(self, "shapes", shapes)

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        return {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
