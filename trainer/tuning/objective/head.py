"""A head of an objective's own, which learns beside the run's method and stands in the place of the language model's.

The `settings.py` of an objective's folder names it in `HEADS`, by the name of the objective. The configuration reads these files, so
they and this one import nothing of it. trainer/tuning/head.py puts the head beside the method.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Head:
    """A matrix (outputs, hidden), `biased` with a bias: an output for each of `data.labels` where it is `labelled`, else one; of the last token of a text, or of
    each token (`per_token`). With `several` each output says for itself whether its label holds.

    `task` is PEFT's name for what it does, `pipeline` the Hub's, and `transformers_class` loads base and head together. `what` it is
    begins a sentence.
    """

    task: str
    pipeline: str
    transformers_class: str
    what: str
    labelled: bool
    biased: bool = False
    per_token: bool = False
    several: bool = False
