"""Turns a row of one prompt and several answers into a document for each of them, or into one in which all share their prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import Data
from trainer.data.format.formats import or_error
from trainer.data.format.messages import text_of, untrained
from trainer.data.render.answers import AnswerRenderer, messages_of
from trainer.data.render.chat import Example, Turn, field_of
from trainer.data.render.shared_prompt import behind, marked, shared_tokens
from trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Alternatives:
    """Tokenized answers to one prompt, each with the prompt. A row holds the first `shared` tokens once; where none are shared, each
    answer is a document of its own."""

    answers: Sequence[Example]
    shared: int = 0

    @property
    def _parts(self) -> list[Example]:
        return [self.answers[0], *(behind(answer, self.shared) for answer in self.answers[1:])]

    @property
    def tokens(self) -> NDArray[np.uint32]:
        return np.concatenate([part.tokens for part in self._parts])

    @property
    def targets(self) -> NDArray[np.bool_]:
        return np.concatenate([part.targets for part in self._parts])

    @property
    def longest(self) -> int:
        """Tokens of the longest answer with its prompt: a row must hold these."""
        return max(len(answer.tokens) for answer in self.answers)

    @property
    def left_out(self) -> Sequence[str]:
        return list(dict.fromkeys(name for answer in self.answers for name in answer.left_out))

    @property
    def teaches(self) -> bool:
        """Whether anything is trained."""
        return any(answer.teaches for answer in self.answers)

    def cut(self, limit: int) -> "Alternatives":
        """Each answer with its prompt, cut to `limit` tokens."""
        return Alternatives([answer.cut(limit) for answer in self.answers], self.shared)

    def pieces(self, limit: int) -> "list[Alternatives]":
        """As few documents of at most `limit` tokens as hold the answers in their order, each with the prompt."""
        assert self.longest <= limit
        groups: list[list[Example]] = []
        room = 0
        for answer in self.answers:
            more = len(answer.tokens) - self.shared
            if not self.shared or more > room:
                groups.append([])
                room = limit - self.shared
            groups[-1].append(answer)
            room -= more
        return [Alternatives(group, self.shared) for group in groups]

    def stored(self) -> NDArray[np.uint32]:
        first, *others = self._parts
        return np.concatenate([first.stored(), *(marked(part, self.shared) for part in others)])


class AlternativesRenderer:
    """Encodes rows of the format answers with one tokenizer; see `AnswerRenderer`, which it gives each answer to."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: Data) -> None:
        self._data, self._encoded = data, AnswerRenderer(tokenizer, data)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Alternatives | DataError]:
        """Each row's answers, or what is wrong with it; the error's text has no place in it.

        Raises:
            ConfigError: as `AnswerRenderer.encode`.
        """
        read = [or_error(self._read, row) for row in rows]
        examples = iter(self._encoded.encode([one for found in read if isinstance(found, list) for one in found]))
        return [self._together([next(examples) for _ in row]) if isinstance(row, list) else row for row in read]

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The turns of the prompt, then those of every answer.

        Raises:
            DataError: the row is none of this format.
        """
        first, *others = self._read(row)
        if "messages" not in first:
            completions = [Turn("assistant", answer["completion"]) for answer in (first, *others)]
            return [Turn("user", first["prompt"]), *completions]
        prompt = len(field_of(row, "prompt", self._data))
        spoken = [*first["messages"], *(message for answer in others for message in answer["messages"][prompt:])]
        return [Turn(message["role"], message["content"], "tool_calls" in message) for message in spoken]

    def _read(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """A row of chat or of prompt_completion for each answer."""
        prompt, answers = (field_of(row, name, self._data) for name in ("prompt", "answers"))
        if not isinstance(answers, list) or not answers:
            raise DataError("answers: this is no list with at least one answer")
        if not isinstance(prompt, list):
            text = text_of(prompt, "prompt")
            return [{"prompt": text, "completion": text_of(answer, "answers")} for answer in answers]
        before = [untrained(message) for message in messages_of(prompt, "prompt")]
        tools = row.get(self._data.fields.get("tools", "tools"))
        return [{"messages": [*before, *_messages(answer)], "tools": tools} for answer in answers]

    def _together(self, answers: list[Example | DataError]) -> Alternatives | DataError:
        """Alternatives that share what comes before the first trained token, where it is the same in all of them."""
        for number, answer in enumerate(answers, 1):
            if isinstance(answer, DataError):
                return DataError(f"answer {number}: {answer}")
        found = [answer for answer in answers if isinstance(answer, Example)]
        teaching = [answer for answer in found if answer.teaches] or found
        if not (self._data.share_prefix and len(teaching) > 1):
            return Alternatives(teaching)
        prompts = [int(answer.targets.argmax()) for answer in teaching]
        alike = [
            np.array_equal(answer.tokens[:first], teaching[0].tokens[: prompts[0]])
            for answer, first in zip(teaching, prompts, strict=True)
        ]
        if not all(alike):
            return DataError(
                f"the prompt is not the same tokens before answer {alike.index(False) + 1} and before the first one: a token reaches across its end; "
                "end a prompt of text with white space"
            )
        return Alternatives(teaching, shared_tokens(teaching[0]))


def _messages(answer: Any) -> list[dict[str, Any]]:
    """An answer to a conversation: its messages, or the words of one."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else messages_of(answer, "answers")
