"""The heads of classification, of texts and of words."""

from trainer.config.objective import Head
from trainer.config.section import Section

SETTINGS: tuple[type[Section], ...] = ()
HEADS = {
    "classification": Head(
        "SEQ_CLS", "text-classification", "AutoModelForSequenceClassification", "A classifier", labelled=True
    ),
    "multilabel_classification": Head(
        "SEQ_CLS",
        "text-classification",
        "AutoModelForSequenceClassification",
        "A classifier",
        labelled=True,
        several=True,
    ),
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
