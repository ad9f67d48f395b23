"""Turns a labelled row into a document: an answer to a prompt, and whether it is desired.

In the same document the answer is followed by the same prompt with the answer of another row. From such mismatched
pairs KTO estimates how far the model is from its reference. The other row is the last one before it that has another
prompt, in the same batch of rows that are read together; before the first row comes the last. So the pairing depends
only on the data set.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from trainer.config import Data
from trainer.data.dataset.binary import DESIRED_BIT, MISMATCHED_BIT
from trainer.data.format.messages import text_of, untrained
from trainer.data.render.answers import Answers, Encoded, ReadRow, Row, messages_of, prompt_tokens, shared_tokens
from trainer.data.render.chat import Example, field_of, tools_of, turns_of
from trainer.data.render.document import Turn
from trainer.errors import DataError

# Text tables can write the label only in these ways.
_WRITTEN = {"true": True, "True": True, "false": False, "False": False}


class Labelled(Answers):
    """An answer to its prompt, marked if it is desired. The mismatched answer follows it if there is room."""

    @property
    def counts(self) -> Mapping[str, int]:
        return {"desired": int(self.marks[0] == DESIRED_BIT)}

    def cut(self, limit: int) -> "Labelled":
        """The first `limit` tokens of the answer. An answer that needs a cut leaves no room for a mismatched one."""
        return self if len(self.tokens) <= limit else replace(self, answers=(self.answers[0].cut(limit),))


def read(row: Row, data: Data) -> ReadRow:
    prompt, completion, label = (field_of(row, name, data) for name in ("prompt", "completion", "label"))
    label = _WRITTEN.get(label, label) if isinstance(label, str) else label
    if not isinstance(label, bool):
        raise DataError(f"the label is {label!r}, and not true (desired) or false (undesired)")
    if isinstance(prompt, list) or isinstance(completion, list):
        before, answer = messages_of(prompt, "prompt"), messages_of(completion, "completion")
        talk = {"messages": [*map(untrained, before), *answer], "tools": tools_of(row, data)}
        return ReadRow([talk], turns_of(before + answer), label)
    texts = {"prompt": text_of(prompt, "prompt"), "completion": text_of(completion, "completion")}
    return ReadRow([texts], [Turn("user", texts["prompt"]), Turn("assistant", texts["completion"])], label)


def documents(rows: list[Encoded], data: Data) -> list[Labelled | DataError]:
    found = [_labelled(answer, row.desired) for row, (answer,) in rows]
    paired = iter(_paired([one for one in found if isinstance(one, Labelled) and one.teaches], data))
    return [next(paired) if isinstance(one, Labelled) and one.teaches else one for one in found]


def _labelled(answer: Example | DataError, desired: bool) -> Labelled | DataError:
    marks = (DESIRED_BIT if desired else np.uint32(0), MISMATCHED_BIT)
    return answer if isinstance(answer, DataError) else Labelled((answer,), marks=marks)


def _paired(found: list[Labelled], data: Data) -> list[Labelled]:
    """Pair each answer with the last one before it that has another prompt, or else with the one directly before it.

    The mismatched answer is cut so that a packed row holds both.
    """
    answers = [one.answers[0] for one in found]
    prompts = [answer.tokens[: prompt_tokens(answer)].tobytes() for answer in answers]
    result = []
    for place, answer in enumerate(answers):
        before = [place - back for back in range(1, len(answers))]
        other = next((index for index in before if prompts[index] != prompts[place]), before[0] if before else None)
        room = data.sequence_length - len(answer.tokens)
        shared = shared_tokens(answer) if data.share_prefix else 0
        # Only the tokens after the shared ones need room in the row.
        mismatched = None if other is None else _mismatched(answer, answers[other]).cut(max(0, room) + shared)
        both = (answer, mismatched) if mismatched and mismatched.teaches else (answer,)
        result.append(replace(found[place], answers=both, shared=shared))
    return result


def _mismatched(answer: Example, other: Example) -> Example:
    """The prompt of an answer with that of another row."""
    mine, theirs = prompt_tokens(answer), prompt_tokens(other)
    tokens = np.concatenate([answer.tokens[:mine], other.tokens[theirs:]])
    return Example(tokens, np.concatenate([answer.targets[:mine], other.targets[theirs:]]))


def one_kind(desired: int, answers: int) -> str | None:
    """A sentence if all labelled training answers are of one kind. `desired` of the `answers` are desired."""
    if desired not in (0, answers):
        return None
    return (
        f"data.train: the label is {'true' if desired else 'false'} in all of the {answers} rows that can be trained"
        " on, so nothing tells desired answers from others. Add rows of the other kind, or choose another objective."
    )
