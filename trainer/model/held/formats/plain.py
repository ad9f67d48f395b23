"""Weights in the type that they are computed with: no base is quantized, and what learns is not frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from trainer.model.held import HeldFormat

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.model.held.layers import HeldWeights


class Plain(HeldFormat):
    """An ordinary parameter of a layer or of a mixture, in 16 or 32 bits."""

    packs: ClassVar[bool] = False
    quantizes: ClassVar[bool] = False
    in_words: ClassVar[str] = "in 16 bits"  # type: ignore[misc]

    def sizes(self, rows: int, columns: int) -> dict[str, int]:
        raise AssertionError("a plain weight stays the parameter that the model has")

    def matrices(self, held: HeldWeights, first: int, last: int) -> Tensor:
        raise AssertionError("a plain weight stays the parameter that the model has")

    def weight(self, linear: Any) -> Tensor:
        return linear.weight


ABOUT = {"none": "16-bit weights"}
HELD = {"none": Plain()}
