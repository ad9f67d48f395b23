"""The common part of what learns beside a method's own: a method around another one.

A file of trainer/tuning whose `AROUND` names a setting puts such a method around the run's where that is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.base.architecture import Architecture
from trainer.base.find.locate import describe_base
from trainer.config import Model
from trainer.tuning.method import ExportedFiles, Method, WeightUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.state.checkpoint.learnt_weights import LearntWeights


class _AsTheMethod:
    """An attribute of a wrapper that is its method's."""

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    def __get__(self, around: Around, _owner: type) -> Any:
        return getattr(around.method, self._name)


@dataclass(frozen=True)
class Around(Method):
    """A method with something more that learns.

    A class of it says what it adds: to the parameters (`own`), to PEFT's folder (`added_to`), and unless it is
    unmergeable to a merge (`own_updates`).
    """

    method: Method

    settings: ClassVar[Any] = _AsTheMethod()
    defaults: ClassVar[Any] = _AsTheMethod()
    trains_base: ClassVar[Any] = _AsTheMethod()
    counts_activations: ClassVar[Any] = _AsTheMethod()
    adapts_4_bits: ClassVar[Any] = _AsTheMethod()
    exports_model: ClassVar[Any] = _AsTheMethod()
    unmergeable: ClassVar[Any] = _AsTheMethod()
    file_names: ClassVar[Any] = _AsTheMethod()
    identity: ClassVar[Any] = _AsTheMethod()
    virtual: ClassVar[Any] = _AsTheMethod()
    mismatches: ClassVar[Any] = _AsTheMethod()
    attach: ClassVar[Any] = _AsTheMethod()
    groups: ClassVar[Any] = _AsTheMethod()
    switched_off: ClassVar[Any] = _AsTheMethod()
    load_exported: ClassVar[Any] = _AsTheMethod()

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


def innermost(method: Method) -> Method:
    """The method itself, without what learns beside it."""
    return innermost(method.method) if isinstance(method, Around) else method
