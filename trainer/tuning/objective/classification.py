"""Classification: each text, or each word of a text, has one of the classes of `data.labels`.

The loss is -log softmax(W h) of its class. W is the head, and h the hidden state of the text's last token, or of the
word's first token. All texts, or all words, have the same weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.config.objective import Head
from trainer.config.section import Section
from trainer.tuning.head import head_of, outputs
from trainer.tuning.objective import Objective
from trainer.tuning.objective.answers import counted_once

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config import ObjectiveSettings
    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel
    from trainer.tuning.method import Method


SETTINGS: tuple[type[Section], ...] = ()
_OF_TEXTS = Head("SEQ_CLS", "text-classification", "AutoModelForSequenceClassification", "A classifier", labelled=True)
HEADS = {
    "classification": _OF_TEXTS,
    "multilabel_classification": replace(_OF_TEXTS, several=True),
    "token_classification": Head(
        "TOKEN_CLS",
        "token-classification",
        "AutoModelForTokenClassification",
        "A tagger",
        labelled=True,
        biased=True,
        per_token=True,
    ),
}


@dataclass(frozen=True)
class Classification(Objective):
    """The formula of the module's docstring.

    `outputs` gives the head's outputs at the places of a row that have a class, in the order of its labels. Accuracy
    and F1 are over the texts or words of the evaluation. Macro F1 is the mean over all classes that occur among labels
    or predictions, as in scikit-learn."""

    name: str
    labels: Sequence[str]
    formats: Collection[str]
    unit: str
    outputs: Callable[[PackedModel, MicroBatch], Tensor]

    measures: ClassVar[Sequence[str]] = ("accuracy", "macro_f1")

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "labels": list(self.labels)}

    @property
    def sums(self) -> int:
        return 3 * len(self.labels)

    def summary(self, means: Sequence[float]) -> list[float]:
        """The measures, from three shares for each class: true positives, predicted texts, and labelled texts."""
        scores, _ = _scores(means, len(self.labels))
        return [sum(means[: len(self.labels)]), sum(scores) / len(scores) if scores else 0.0]

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch
        from torch.nn.functional import cross_entropy, one_hot

        logits, row = self.outputs(model, batch), batch.whole
        numbers, classes = row.labels[0, row.places], len(self.labels)
        loss = cross_entropy(logits, numbers, reduction="sum")
        taken, there = (one_hot(found, classes) for found in (logits.detach().argmax(-1), numbers))
        counts = (some.sum(0) for some in (taken * there, taken, there))
        return counted_once(torch.cat([loss[None], *counts]), batch)


@dataclass(frozen=True)
class Several(Objective):
    """Each text has any number of the classes.

    The loss is the mean over texts and classes of -log s(o) if the text has the class, else -log(1 - s(o)), with o the
    class's output and s the logistic function. Accuracy is the share of texts for which every class is right. Micro F1
    is over all decisions; macro F1 is the mean over all classes that occur among labels or predictions, as in
    scikit-learn."""

    labels: Sequence[str]

    formats = ("multilabel", "multilabel_pictures")
    unit = "decisions"
    measures = ("accuracy", "micro_f1", "macro_f1")

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": "multilabel_classification", "labels": list(self.labels)}

    @property
    def sums(self) -> int:
        return 1 + 3 * len(self.labels)

    def summary(self, means: Sequence[float]) -> list[float]:
        """The measures, from the share of decisions in texts that are wholly right, and the shares of `_scores`."""
        exact, *counts = means
        scores, whole = _scores(counts, len(self.labels))
        return [exact, whole, sum(scores) / len(scores) if scores else 0.0]

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        classes, row = len(self.labels), batch.whole
        there = row.labels[0, row.places].view(-1, classes).float()  # the flags stand behind the text
        logits = outputs(model, batch, row.places.view(-1, classes)[:, 0])
        loss = binary_cross_entropy_with_logits(logits, there, reduction="sum")
        taken = (logits.detach() > 0).float()
        exact = (taken == there).all(-1).sum() * classes
        counts = (flags.sum(0) for flags in (taken * there, taken, there))
        return counted_once(torch.cat([loss[None], exact[None], *counts]), batch)


def _scores(counts: Sequence[float], classes: int) -> tuple[list[float], float]:
    """The F1 of each class that occurs among labels or predictions, and the F1 over all classes.

    `counts` has for each class the shares of true positives, of predictions and of labels.
    """
    right, taken, there = (counts[part * classes : (part + 1) * classes] for part in range(3))
    scores = [2 * r / (t + n) for r, t, n in zip(right, taken, there, strict=True) if t + n]
    return scores, 2 * sum(right) / (sum(taken) + sum(there)) if scores else 0.0


def _of_texts(model: PackedModel, batch: MicroBatch) -> Tensor:
    return outputs(model, batch, batch.whole.places)


def _of_words(model: PackedModel, batch: MicroBatch) -> Tensor:
    """The numbers of tags stand behind the text in a segment of the same size. They do not pass through the model."""
    import torch

    from trainer.model.micro_batch import Role

    texts, tags, borders = batch.part(Role.DOCUMENT), batch.whole.places + 1, batch.input.cu_seqlens
    segments = torch.searchsorted(borders, tags, right=True) - 1
    documents = torch.searchsorted(batch.segments(Role.MISMATCHED), segments)
    return outputs(model, texts, texts.input.cu_seqlens[documents] + tags - borders[segments])


def _labels(method: Method) -> Sequence[str]:
    head = head_of(method)
    assert head is not None
    return head.labels


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {
    "classification": lambda given, method: Classification(
        "classification", _labels(method), ("classified", "classified_pictures"), "texts", _of_texts
    ),
    "multilabel_classification": lambda given, method: Several(_labels(method)),
    "token_classification": lambda given, method: Classification(
        "token_classification", _labels(method), ("tagged",), "words", _of_words
    ),
}
ABOUT = {
    "classification": "the class of a text (data.format: classified)",
    "multilabel_classification": "any number of classes for each text (data.format: multilabel)",
    "token_classification": "the class of each word (data.format: tagged)",
}
