"""The base class of a method that wraps another one and trains more parameters beside it.

A file of trainer/tuning names a setting in `AROUND`. If the run sets it, that file wraps the run's method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.tuning.method import ExportedFiles, Method, WeightUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.base.architecture import Architecture
    from trainer.config import Model
    from trainer.state.checkpoint.learnt_weights import LearntWeights


class _AsTheMethod:
    """An attribute of a wrapper that forwards to the wrapped method."""

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    def __get__(self, around: Around, _owner: type) -> Any:
        return getattr(around.method, self._name)


@dataclass(frozen=True)
class Around(Method):
    """A method that wraps another one and trains more parameters.

    A subclass says what it adds: to the parameters (`own`), to PEFT's folder (`added_to`), and to a merge
    (`own_updates`) unless it is unmergeable.
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
    through: ClassVar[Any] = _AsTheMethod()
    mismatches: ClassVar[Any] = _AsTheMethod()
    attach: ClassVar[Any] = _AsTheMethod()
    groups: ClassVar[Any] = _AsTheMethod()
    switched_off: ClassVar[Any] = _AsTheMethod()
    load_exported: ClassVar[Any] = _AsTheMethod()

    def own(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Name in the model -> shape of every parameter that it trains beside those of the method."""
        raise NotImplementedError

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        return {**self.method.shapes(architecture), **self.own(architecture)}

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """PEFT's folder of the method, with the parameters of the wrapper added."""
        from trainer.base.find.locate import describe_base

        architecture = describe_base(model).architecture
        own = self.own(architecture)
        theirs = self.method.export({name: values for name, values in weights.items() if name not in own}, model)
        return self.added_to(theirs, {name: values for name, values in weights.items() if name in own}, architecture)

    def added_to(self, theirs: ExportedFiles, ours: dict[str, Tensor], architecture: Architecture) -> ExportedFiles:
        """Add the weights `ours`, by name in the model, to `theirs`, PEFT's folder of the method."""
        raise NotImplementedError

    def updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, WeightUpdate]:
        return {**self.method.updates(weights, architecture), **self.own_updates(weights, architecture)}

    def own_updates(self, weights: LearntWeights, architecture: Architecture) -> Mapping[str, WeightUpdate]:
        """The changes that the wrapper adds to the method's in a merge."""
        raise NotImplementedError


def innermost(method: Method) -> Method:
    """The method itself, without its wrappers."""
    return innermost(method.method) if isinstance(method, Around) else method
