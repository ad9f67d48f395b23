"""A weight whose transpose the files hold is changed there as it would be in the model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.export.write.merged import _OfTheTranspose


@dataclass(frozen=True)
class _Adds:
    """Adds these values (rows, columns) to a weight."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def apply_to(self, rows: Tensor, first: int) -> None:
        assert first == 0
        rows.add_(self.values.reshape(rows.shape))


def test_the_transpose_gets_the_transposed_change() -> None:
    weight, change = torch.arange(6.0).view(3, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    stored = weight.t().contiguous()
    update = _OfTheTranspose(_Adds(change))
    assert update.shape == (1, 6)  # the files' rows are none of the weight's
    update.apply_to(stored.view(update.shape), 0)
    assert torch.equal(stored, (weight + change).t())
