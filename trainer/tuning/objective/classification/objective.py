"""Classification: each text, or each word of one, has one of the classes of `data.labels`. The loss is -log softmax(W h) of its class, with h the
hidden state of the text's last token, or of the word's first, and W the head; texts, or words, weigh the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.config import ObjectiveSettings
from trainer.tuning.head import head_of, outputs
from trainer.tuning.method import Method
from trainer.tuning.objective.objective import Objective, Survey

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel


@dataclass(frozen=True)
class Classification:
    """The formula of the module's docstring. `outputs` are those of the head where a row has a class, in the order of its labels. Accuracy and F1 are of the
    texts or words that are looked at, macro F1 is the mean over the classes that these have or are taken for, as in scikit-learn."""

    name: str
    labels: Sequence[str]
    formats: Collection[str]
    unit: str
    outputs: Callable[[PackedModel, MicroBatch], Tensor]

    settings: Collection[str] = ()
    reads_reference: bool = False
    survey: Survey | None = None
    measures: Sequence[str] = ("accuracy", "macro_f1")

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {"name": "sft"}

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "labels": list(self.labels)}

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

        logits = self.outputs(model, batch)
        numbers, classes = batch.labels[0, batch.places], len(self.labels)
        loss = cross_entropy(logits, numbers, reduction="sum")
        taken, there = (one_hot(found, classes) for found in (logits.detach().argmax(-1), numbers))
        return torch.cat([loss[None], *((counts.sum(0)) for counts in (taken * there, taken, there))])

    def reference(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        raise AssertionError("classes have no reference")

    def weight(self, batch: MicroBatch) -> int:
        return batch.targets


def _of_texts(model: PackedModel, batch: MicroBatch) -> Tensor:
    return outputs(model, batch, batch.places)


def _of_words(model: PackedModel, batch: MicroBatch) -> Tensor:
    """The numbers of tags, which stand behind the text in a segment of its size, are not passed through the model."""
    import torch

    texts, tags = batch.part("beginnings"), batch.places + 1
    segments = torch.searchsorted(batch.cu_seqlens, tags, right=True) - 1
    documents = torch.searchsorted(batch.mismatched, segments)
    return outputs(model, texts, texts.cu_seqlens[documents] + tags - batch.cu_seqlens[segments])


def _labels(method: Method) -> Sequence[str]:
    head = head_of(method)
    assert head is not None
    return head.labels


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {
    "classification": lambda given, method: Classification(
        "classification", _labels(method), ("classified",), "texts", _of_texts
    ),
    "token_classification": lambda given, method: Classification(
        "token_classification", _labels(method), ("tagged",), "words", _of_words
    ),
}
