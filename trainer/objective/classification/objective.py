"""Classification: each text has one of the classes of `data.labels`. The loss of a text is -log softmax(W h) of its class, with h the
hidden state of its last token and W the head; texts weigh the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.config import ObjectiveSettings
from trainer.objective.objective import Objective, Survey
from trainer.tuning.head import head_of, outputs
from trainer.tuning.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.order.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel


@dataclass(frozen=True)
class Classification:
    """The formula of the module's docstring. Accuracy and F1 are of the texts that are looked at, macro F1 is the mean over the classes
    that these have or are taken for, as in scikit-learn."""

    labels: Sequence[str]

    settings: Collection[str] = ()
    formats: Collection[str] = ("classified",)
    reads_reference: bool = False
    survey: Survey | None = None
    unit: str = "texts"
    measures: Sequence[str] = ("accuracy", "macro_f1")

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {"name": "sft"}

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": "classification", "labels": list(self.labels)}

    def mismatches(self) -> list[str]:
        return []

    @property
    def sums(self) -> int:
        return 3 * len(self.labels)

    def summary(self, means: Sequence[float]) -> list[float]:
        """The measures, by the shares of texts that are of a class and taken for it, of those taken for it, and of those of it."""
        classes = len(self.labels)
        right, taken, there = (means[part * classes : (part + 1) * classes] for part in range(3))
        scores = [2 * r / (t + n) for r, t, n in zip(right, taken, there, strict=True) if t + n]
        return [sum(right), sum(scores) / len(scores) if scores else 0.0]

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch
        from torch.nn.functional import cross_entropy, one_hot

        logits = outputs(model, batch, batch.places)
        numbers, classes = batch.labels[0, batch.places], len(self.labels)
        loss = cross_entropy(logits, numbers, reduction="sum")
        taken, there = (one_hot(found, classes) for found in (logits.detach().argmax(-1), numbers))
        return torch.cat([loss[None], *((counts.sum(0)) for counts in (taken * there, taken, there))])

    def reference(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        raise AssertionError("classes have no reference")

    def weight(self, batch: MicroBatch) -> int:
        return batch.targets


def _make(given: ObjectiveSettings, method: Method) -> Classification:
    head = head_of(method)
    assert head is not None
    return Classification(head.labels)


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {"classification": _make}
