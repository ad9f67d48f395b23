"""Several answers to one prompt that have its tokens in common (`data.share_prefix`).

alone:    p p p P a a a    p p p P b b        both predict their first token from P, the prompt's last one
sharing:  p p p P a a a P b b                 P and b see p p p, and none of a
"""

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset.binary import SHARED_BIT
from trainer.data.render.chat import Example


def shared_tokens(answer: Example) -> int:
    """The tokens that all answers to a prompt share, counted in one of them with its prompt: all of the prompt but its last token, which
    predicts the first one of each answer."""
    return max(0, int(answer.targets.argmax()) - 1)


def behind(answer: Example, shared: int) -> Example:
    """The answer without the first `shared` tokens."""
    return Example(answer.tokens[shared:], answer.targets[shared:], answer.left_out)


def marked(answer: Example, shared: int) -> NDArray[np.uint32]:
    """An answer behind another one, as a data set holds it: it goes on from the prompt, if any of that is shared."""
    stored = answer.stored()
    if shared:
        stored[0] |= SHARED_BIT
    return stored
