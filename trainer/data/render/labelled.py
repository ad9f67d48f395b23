"""Turns a labelled row into a document: an answer to a prompt, and whether it is desired.

Behind the answer stands, in the same document, the same prompt with the answer of another row: KTO estimates from such
mismatched pairs how far the model is from its reference. The other row is the one before, in the same batch of rows that are
read together, with another prompt; before the first comes the last. So the pairing depends on the data set alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config import Data
from trainer.data.dataset.binary import DESIRED_BIT, MISMATCHED_BIT
from trainer.data.format.formats import or_error
from trainer.data.format.messages import text_of, untrained
from trainer.data.render.answers import AnswerRenderer, messages_of
from trainer.data.render.chat import Example, Turn, field_of
from trainer.data.render.shared_prompt import behind, marked, shared_tokens
from trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tables of text have no other values.
_WRITTEN = {"true": True, "True": True, "false": False, "False": False}


@dataclass(frozen=True, eq=False)
class Labelled:
    """An answer with its prompt and its label. Where there is room, the mismatched answer stands behind it, less the first `shared` tokens,
    which both have."""

    answer: Example
    desired: bool
    mismatched: Example | None = None
    shared: int = 0

    @property
    def _parts(self) -> list[Example]:
        return [self.answer, *([behind(self.mismatched, self.shared)] if self.mismatched else [])]

    @property
    def tokens(self) -> NDArray[np.uint32]:
        return np.concatenate([part.tokens for part in self._parts])

    @property
    def targets(self) -> NDArray[np.bool_]:
        return np.concatenate([part.targets for part in self._parts])

    @property
    def left_out(self) -> Sequence[str]:
        return self.answer.left_out

    @property
    def teaches(self) -> bool:
        """Whether anything of the answer is trained."""
        return self.answer.teaches

    def cut(self, limit: int) -> "Labelled":
        """The first `limit` tokens of the answer; beside one that needs a cut there is no room for another."""
        return self if len(self.tokens) <= limit else Labelled(self.answer.cut(limit), self.desired)

    def pieces(self, limit: int) -> "list[Labelled]":
        """Itself: an answer is never split."""
        assert len(self.tokens) <= limit
        return [self]

    def stored(self) -> NDArray[np.uint32]:
        parts = [marked(part, shared) for part, shared in zip(self._parts, (0, self.shared), strict=False)]
        for part, bit in zip(parts, (DESIRED_BIT if self.desired else 0, MISMATCHED_BIT), strict=False):
            part[0] |= bit
        return np.concatenate(parts)

    def beside(self, other: "Labelled", room: int, shared: int) -> "Labelled":
        """This answer, and behind it the prompt with the other row's answer: its first `room` tokens after the `shared` ones, if these reach into
        that answer."""
        mine, theirs = self.prompt_tokens, other.prompt_tokens
        tokens = np.concatenate([self.answer.tokens[:mine], other.answer.tokens[theirs:]])
        targets = np.concatenate([self.answer.targets[:mine], other.answer.targets[theirs:]])
        mismatched = Example(tokens, targets).cut(max(0, room) + shared)
        return Labelled(self.answer, self.desired, mismatched if mismatched.teaches else None, shared)

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first trained one."""
        return int(self.answer.targets.argmax())

    @property
    def prompt(self) -> bytes:
        return self.answer.tokens[: self.prompt_tokens].tobytes()


class _Row(NamedTuple):
    """A row as one of another format, its label, and its turns."""

    row: dict[str, Any]
    desired: bool
    turns: list[Turn]


class LabelledRenderer:
    """Encodes rows of the format labelled with one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: Data) -> None:
        self._data, self._answers = data, AnswerRenderer(tokenizer, data)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Labelled | DataError]:
        """Each row's answer, with one of another of these rows behind it, or what is wrong with it.

        Raises:
            ConfigError: as `AnswerRenderer.encode`.
        """
        read = [or_error(self._read, row) for row in rows]
        examples = iter(self._answers.encode([found.row for found in read if isinstance(found, _Row)]))
        result: list[Labelled | DataError] = []
        for found in read:
            if isinstance(found, DataError):
                result.append(found)
            else:
                example = next(examples)
                result.append(example if isinstance(example, DataError) else Labelled(example, found.desired))
        answers = [found for found in result if isinstance(found, Labelled) and found.teaches]
        paired = iter(_paired(answers, self._data))
        return [next(paired) if isinstance(found, Labelled) and found.teaches else found for found in result]

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The turns of the prompt and of the answer.

        Raises:
            DataError: the row is none of this format.
        """
        return self._read(row).turns

    def _read(self, row: dict[str, Any]) -> _Row:
        prompt, completion, label = (field_of(row, name, self._data) for name in ("prompt", "completion", "label"))
        label = _WRITTEN.get(label, label) if isinstance(label, str) else label
        if not isinstance(label, bool):
            raise DataError(f"the label is {label!r}, and not true (desired) or false (undesired)")
        if isinstance(prompt, list) or isinstance(completion, list):
            before, answer = messages_of(prompt, "prompt"), messages_of(completion, "completion")
            turns = [Turn(message["role"], message["content"], "tool_calls" in message) for message in before + answer]
            tools = row.get(self._data.fields.get("tools", "tools"))
            return _Row({"messages": [*map(untrained, before), *answer], "tools": tools}, label, turns)
        texts = {"prompt": text_of(prompt, "prompt"), "completion": text_of(completion, "completion")}
        return _Row(texts, label, [Turn("user", texts["prompt"]), Turn("assistant", texts["completion"])])


def _paired(answers: list[Labelled], data: Data) -> list[Labelled]:
    """Each answer with the one before it that has another prompt, as far as a row holds both; else with the one before it."""
    prompts = [answer.prompt for answer in answers]
    result = []
    for place, answer in enumerate(answers):
        before = [place - back for back in range(1, len(answers))]
        other = next((index for index in before if prompts[index] != prompts[place]), before[0] if before else None)
        room = data.sequence_length - len(answer.answer.tokens)
        shared = shared_tokens(answer.answer) if data.share_prefix else 0
        result.append(answer if other is None else answer.beside(answers[other], room, shared))
    return result


def one_kind(desired: int, answers: int) -> str | None:
    """A sentence for labelled training data of one kind only, where so many of the `answers` are desired."""
    if desired not in (0, answers):
        return None
    return (
        f"data.train: the label is {'true' if desired else 'false'} in all of the {answers} rows that can be trained on, so nothing "
        "tells desired answers from others. Add rows of the other kind, or choose another objective."
    )
