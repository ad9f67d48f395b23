"""Turns a preference row into a pair: a chosen and a rejected answer to one prompt, as two documents that stay together.

An answer is a list of messages, rendered by the chat template, or a string. The prompt is the field `prompt`, or without one
what chosen and rejected have in common at their beginning. It is never trained.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import Data
from trainer.data.dataset.binary import REJECTED_BIT
from trainer.data.format.formats import or_error
from trainer.data.format.messages import Message, text_of, untrained
from trainer.data.render.answers import AnswerRenderer, messages_of
from trainer.data.render.chat import Example, Turn, field_of
from trainer.data.render.shared_prompt import behind, marked, shared_tokens
from trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Pair:
    """Two tokenized documents that begin with the same prompt; it is stored, packed and visited like one document, with the first `shared` tokens
    once."""

    chosen: Example
    rejected: Example
    shared: int = 0

    @property
    def tokens(self) -> NDArray[np.uint32]:
        return np.concatenate([self.chosen.tokens, self.rejected.tokens[self.shared :]])

    @property
    def targets(self) -> NDArray[np.bool_]:
        return np.concatenate([self.chosen.targets, self.rejected.targets[self.shared :]])

    @property
    def left_out(self) -> Sequence[str]:
        return list(dict.fromkeys([*self.chosen.left_out, *self.rejected.left_out]))

    @property
    def teaches(self) -> bool:
        """Whether both have something trained, and are not the same."""
        alike = np.array_equal(self.chosen.tokens, self.rejected.tokens)
        return self.chosen.teaches and self.rejected.teaches and not alike

    def cut(self, limit: int) -> "Pair":
        """Both answers cut so that they have `limit` tokens together. Each gets half of the room behind what they share, and what the other
        leaves of its half."""
        room, shared = max(0, limit - self.shared), self.shared
        chosen = self.chosen.cut(shared + max(room // 2, room - len(self.rejected.tokens) + shared))
        return Pair(chosen, self.rejected.cut(limit - len(chosen.tokens) + shared), shared)

    def pieces(self, limit: int) -> "list[Pair]":
        """Itself: a pair is never split."""
        assert len(self.tokens) <= limit
        return [self]

    def stored(self) -> NDArray[np.uint32]:
        rejected = marked(behind(self.rejected, self.shared), self.shared)
        rejected[0] |= REJECTED_BIT
        return np.concatenate([self.chosen.stored(), rejected])


@dataclass(frozen=True)
class _Answers:
    """A row as two rows of another format, and the turns of the chosen answer with its prompt, then of the rejected one."""

    chosen: dict[str, Any]
    rejected: dict[str, Any]
    turns: list[Turn]


class PairRenderer:
    """Encodes rows of the format preference with one tokenizer; see `AnswerRenderer`, which it gives each answer to."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: Data) -> None:
        self._data, self._encoded = data, AnswerRenderer(tokenizer, data)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Pair | DataError]:
        """Each row's pair, or what is wrong with it; the error's text has no place in it.

        Raises:
            ConfigError: the tokenizer cannot serve rows of messages, or of strings, as `chat.Renderer` says.
        """
        found = [or_error(self._answers, row) for row in rows]
        answers = [both for both in found if isinstance(both, _Answers)]
        examples = iter(self._encoded.encode([row for both in answers for row in (both.chosen, both.rejected)]))
        pairs = (_pair(next(examples), next(examples)) if isinstance(both, _Answers) else both for both in found)
        return [self._with_shared(pair) for pair in pairs]

    def _with_shared(self, pair: Pair | DataError) -> Pair | DataError:
        if isinstance(pair, DataError) or not (self._data.share_prefix and pair.teaches):
            return pair
        return replace(pair, shared=shared_tokens(pair.chosen))

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The turns of the prompt and of the chosen answer, then those of the rejected one.

        Raises:
            DataError: the row is none of this format.
        """
        return self._answers(row).turns

    def _answers(self, row: dict[str, Any]) -> _Answers:
        chosen, rejected = (field_of(row, name, self._data) for name in ("chosen", "rejected"))
        if chosen == rejected:
            raise DataError("chosen and rejected are the same, so nothing is preferred")
        if isinstance(chosen, list) or isinstance(rejected, list):
            return self._conversations(row, messages_of(chosen, "chosen"), messages_of(rejected, "rejected"))
        texts = {name: text_of(given, name) for name, given in (("chosen", chosen), ("rejected", rejected))}
        if self._data.fields.get("prompt", "prompt") in row:
            prompt = text_of(field_of(row, "prompt", self._data), "prompt")
        else:
            prompt = _shared_beginning(*texts.values())
            texts = {name: text.removeprefix(prompt) for name, text in texts.items()}
        turns = [Turn("user", prompt), *(Turn("assistant", text) for text in texts.values())]
        rows = {name: {"prompt": prompt, "completion": text} for name, text in texts.items()}
        return _Answers(rows["chosen"], rows["rejected"], turns)

    def _conversations(self, row: dict[str, Any], chosen: list[Message], rejected: list[Message]) -> _Answers:
        given = row.get(self._data.fields.get("prompt", "prompt"))
        if isinstance(given, list):
            prompt = messages_of(given, "prompt")
            chosen, rejected = prompt + chosen, prompt + rejected
        shared = len(list(takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))))
        # Data sets of today also repeat the first question as a string beside the messages that contain it.
        if isinstance(given, str) and all(message["content"] != given for message in chosen[:shared]):
            raise DataError(
                "the prompt is a string, and not the content of a message that chosen and rejected begin with"
            )
        if shared == min(len(chosen), len(rejected)):
            raise DataError("chosen or rejected has no message beyond those that both begin with, so it is no answer")
        prompt = [untrained(message) for message in chosen[:shared]]
        tools = row.get(self._data.fields.get("tools", "tools"))
        turns = [
            Turn(message["role"], message["content"], "tool_calls" in message) for message in chosen + rejected[shared:]
        ]
        return _Answers(
            {"messages": prompt + chosen[shared:], "tools": tools},
            {"messages": prompt + rejected[shared:], "tools": tools},
            turns,
        )


def _shared_beginning(chosen: str, rejected: str) -> str:
    """The words that both begin with. The white space behind them belongs to the answers, as tokens begin with it."""
    shared = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)))
    words = re.match(r"(.*\S)?(?=\s)", chosen[:shared], re.DOTALL)
    return words[0] if words else ""


def _pair(chosen: Example | DataError, rejected: Example | DataError) -> Pair | DataError:
    """Both documents, whose prompts must be the same tokens: a difference before the first trained token would not be judged."""
    for name, document in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(document, DataError):
            return DataError(f"{name}: {document}")
    assert isinstance(chosen, Example)
    assert isinstance(rejected, Example)
    if chosen.teaches and rejected.teaches:
        first, second = int(chosen.targets.argmax()), int(rejected.targets.argmax())
        if not np.array_equal(chosen.tokens[:first], rejected.tokens[:second]):
            return DataError(
                f"the prompt is not the same tokens in chosen ({first}) and rejected ({second}): they differ before an answer "
                "begins, or a token reaches across the prompt's end; end a prompt of text with white space"
            )
    return Pair(chosen, rejected)
