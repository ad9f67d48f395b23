"""The head of classification."""

from trainer.objective.head import Head
from trainer.section import Section

SETTINGS: tuple[type[Section], ...] = ()
HEADS = {
    "classification": Head(
        "SEQ_CLS", "text-classification", "AutoModelForSequenceClassification", "A classifier", labelled=True
    ),
}
