"""Several answers to one prompt as one document, which may have the prompt's tokens in common (`data.share_prefix`).

alone:    p p p P a a a    p p p P b b        both predict their first token from P, the prompt's last one
sharing:  p p p P a a a P b b                 P and b see p p p, and none of a
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset.binary import SHARED_BIT
from trainer.data.render.chat import Example


@dataclass(frozen=True, eq=False)
class Answers:
    """Tokenized answers to one prompt, each with the prompt; a row holds the first `shared` tokens once. The first token of answer i is stored with
    the bit `marks[i]`."""

    answers: Sequence[Example]
    shared: int = 0
    marks: Sequence[np.uint32] = ()

    @property
    def _parts(self) -> list[Example]:
        """The answers as they follow each other in a row."""
        first, *others = self.answers
        return [first, *(Example(one.tokens[self.shared :], one.targets[self.shared :]) for one in others)]

    @property
    def tokens(self) -> NDArray[np.uint32]:
        return np.concatenate([part.tokens for part in self._parts])

    @property
    def targets(self) -> NDArray[np.bool_]:
        return np.concatenate([part.targets for part in self._parts])

    @property
    def left_out(self) -> Sequence[str]:
        return list(dict.fromkeys(name for answer in self.answers for name in answer.left_out))

    @property
    def teaches(self) -> bool:
        """Whether anything is trained."""
        return any(answer.teaches for answer in self.answers)

    def pieces(self, limit: int) -> list[Self]:
        """Itself: answers that belong together are never split."""
        assert len(self.tokens) <= limit
        return [self]

    def stored(self) -> NDArray[np.uint32]:
        """The tokens as a data set holds them, (n,)."""
        parts = [part.stored() for part in self._parts]
        if self.shared:
            for part in parts[1:]:
                part[0] |= SHARED_BIT
        for part, mark in zip(parts, self.marks, strict=False):
            part[0] |= mark
        return np.concatenate(parts)


def prompt_tokens(answer: Example) -> int:
    """Tokens before the first trained one."""
    return int(answer.targets.argmax())


def shared_tokens(answer: Example) -> int:
    """The tokens that all answers to a prompt share, counted in one of them with its prompt: all of the prompt but its last token, which
    predicts the first one of each answer."""
    return max(0, prompt_tokens(answer) - 1)
