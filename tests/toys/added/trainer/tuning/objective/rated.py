"""A toy objective of the kind of rows `rated`: the next token's loss, weighed by the rating of its document."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainer.tuning.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config import ObjectiveSettings
    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel
    from trainer.tuning.method import Method


class Rated(Objective):
    formats = ("rated",)
    unit = "targets"
    measures = ("rating", "place", "share")

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": "rated"}

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch

        from trainer.tuning.objective.answers import segments_of_targets

        nats = model.head(model.hidden(batch.input), batch.labels, batch.places, per_target=True)
        rating = torch.zeros(len(batch.lengths), device=nats.device)
        rating[: len(batch.documents)] = batch.column("rating")
        mine = rating[segments_of_targets(batch)]
        # The label of place p is the token behind it, and `share` has the place of that token.
        places = batch.column("place").float()[batch.places] + 1
        share = batch.column("share").float()[:, 1]
        return torch.stack([(nats * mine).sum(), mine.sum(), places.sum(), share.sum()])


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {"rated": lambda _given, _method: Rated()}
