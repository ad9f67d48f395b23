"""Turns a preference row into a pair: a chosen and a rejected answer to one prompt, which stay together.

An answer is a list of messages, which the chat template renders, or a string. The prompt is the field `prompt`, or else
the common beginning of chosen and rejected. It is never trained.
"""

import re
from dataclasses import replace
from itertools import takewhile

import numpy as np

from trainer.config import Data
from trainer.data.dataset.binary import REJECTED_BIT
from trainer.data.format.messages import Message, text_of, untrained
from trainer.data.format.spans import shared_beginning
from trainer.data.render.answers import Answers, Encoded, ReadRow, Row, messages_of, prompt_tokens, shared_tokens
from trainer.data.render.chat import Example, field_of, tools_of, turns_of
from trainer.data.render.document import Turn
from trainer.errors import DataError

_MARKS = (np.uint32(0), REJECTED_BIT)


class Pair(Answers):
    """A chosen and a rejected answer, which are stored, packed and visited like one document."""

    @property
    def teaches(self) -> bool:
        """Whether both answers have trained tokens, and differ."""
        chosen, rejected = self.answers
        return chosen.teaches and rejected.teaches and not np.array_equal(chosen.tokens, rejected.tokens)

    def cut(self, limit: int) -> "Pair":
        """Both answers, cut so that they have `limit` tokens together.

        Each gets half of the room after the shared tokens, and what the other leaves of its half."""
        (chosen, rejected), shared = self.answers, self.shared
        room = max(0, limit - shared)
        # A prompt that is longer than a row leaves no room: the row then holds only a part of the prompt, which trains
        # nothing.
        chosen = chosen.cut(min(limit, shared + max(room // 2, room - len(rejected.tokens) + shared)))
        return replace(self, answers=(chosen, rejected.cut(limit - len(chosen.tokens) + shared)))


def read(row: Row, data: Data) -> ReadRow:
    chosen, rejected = (field_of(row, name, data) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError("chosen and rejected are the same, so nothing is preferred")
    if isinstance(chosen, list) or isinstance(rejected, list):
        return _read_conversations(row, messages_of(chosen, "chosen"), messages_of(rejected, "rejected"), data)
    texts = [text_of(chosen, "chosen"), text_of(rejected, "rejected")]
    if data.fields.get("prompt", "prompt") in row:
        prompt = text_of(field_of(row, "prompt", data), "prompt")
    else:
        prompt = _shared_words(*texts)
        texts = [text.removeprefix(prompt) for text in texts]
    turns = [Turn("user", prompt), *(Turn("assistant", text) for text in texts)]
    return ReadRow([{"prompt": prompt, "completion": text} for text in texts], turns)


def _read_conversations(row: Row, chosen: list[Message], rejected: list[Message], data: Data) -> ReadRow:
    given = row.get(data.fields.get("prompt", "prompt"))
    if isinstance(given, list):
        prompt = messages_of(given, "prompt")
        chosen, rejected = prompt + chosen, prompt + rejected
    shared = len(list(takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))))
    # Some data sets repeat the first question as a string beside the messages that contain it.
    if isinstance(given, str) and all(message["content"] != given for message in chosen[:shared]):
        raise DataError("the prompt is a string, and not the content of a message that chosen and rejected begin with")
    if shared == min(len(chosen), len(rejected)):
        raise DataError("chosen or rejected has no message beyond those that both begin with, so it is no answer")
    prompt, tools = [untrained(message) for message in chosen[:shared]], tools_of(row, data)
    rows = [{"messages": prompt + answer[shared:], "tools": tools} for answer in (chosen, rejected)]
    return ReadRow(rows, turns_of(chosen + rejected[shared:]))


def _shared_words(chosen: str, rejected: str) -> str:
    """The words with which both begin. White space after them belongs to the answers, because tokens begin with it."""
    words = re.match(r"(.*\S)?(?=\s)", chosen[: shared_beginning(chosen, rejected)], re.DOTALL)
    return words[0] if words else ""


def documents(rows: list[Encoded], data: Data) -> list[Pair | DataError]:
    return [_pair(chosen, rejected, data) for _, (chosen, rejected) in rows]


def _pair(chosen: Example | DataError, rejected: Example | DataError, data: Data) -> Pair | DataError:
    """The pair of both answers. Their prompts must have equal tokens.

    A difference before the first trained token would not be judged.
    """
    if isinstance(chosen, DataError):
        return DataError(f"chosen: {chosen}")
    if isinstance(rejected, DataError):
        return DataError(f"rejected: {rejected}")
    if chosen.teaches and rejected.teaches:
        first, second = prompt_tokens(chosen), prompt_tokens(rejected)
        if not np.array_equal(chosen.tokens[:first], rejected.tokens[:second]):
            return DataError(
                f"the prompt is not the same tokens in chosen ({first}) and rejected ({second}): they differ before an"
                " answer begins, or a token reaches across the prompt's end; end a prompt of text with white space"
            )
    pair = Pair((chosen, rejected), marks=_MARKS)
    return replace(pair, shared=shared_tokens(chosen)) if data.share_prefix and pair.teaches else pair
