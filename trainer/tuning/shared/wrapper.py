"""The common part of what learns beside a method's own: a method around another one.

A file of trainer/tuning whose `AROUND` names a setting puts such a method around the run's where that is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.base.architecture import Architecture
from trainer.base.find.locate import describe_base
from trainer.config import Model
from trainer.tuning.method import ExportedFiles, LearntWeights, Method, WeightUpdate

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Around:
    """A method with something more that learns. What it does not say itself is said by its method.

    A class of it says what it adds: to the parameters (`own`), to PEFT's folder (`added_to`), and unless it is
    unmergeable to a merge (`own_updates`).
    """

    method: Method

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def own(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Name in the model -> shape of every parameter that learns beside those of the method."""
        raise NotImplementedError

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        return {**self.method.shapes(architecture), **self.own(architecture)}

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """PEFT's folder of the method, with what is learnt beside it."""
        architecture = describe_base(model).architecture
        own = self.own(architecture)
        theirs = self.method.export({name: values for name, values in weights.items() if name not in own}, model)
        return self.added_to(theirs, {name: values for name, values in weights.items() if name in own}, architecture)

    def added_to(self, theirs: ExportedFiles, ours: dict[str, Tensor], architecture: Architecture) -> ExportedFiles:
        """`theirs`, PEFT's folder of the method, with the weights `ours`, by name in the model."""
        raise NotImplementedError

    def updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, WeightUpdate]:
        return {**self.method.updates(weights, architecture), **self.own_updates(weights, architecture)}

    def own_updates(self, weights: LearntWeights, architecture: Architecture) -> Mapping[str, WeightUpdate]:
        """The changes of a merge beside those of the method."""
        raise NotImplementedError
