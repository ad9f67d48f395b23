"""Classification of texts and of words, and its heads."""

from dataclasses import replace

from trainer.config.objective import Head
from trainer.config.section import Section

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
