"""Turns a row of one prompt and several answers into documents: one for each answer, or one that shares the prompt."""

from dataclasses import replace
from typing import Any, Self

import numpy as np

from trainer.config import Data
from trainer.data.format.messages import text_of, untrained
from trainer.data.render.answers import Answers, Encoded, ReadRow, Row, messages_of, prompt_tokens, shared_tokens
from trainer.data.render.chat import Example, field_of, tools_of, turns_of
from trainer.data.render.document import Turn
from trainer.errors import DataError


class Alternatives(Answers):
    """Answers that are each trained by themselves. If they share no tokens, each is a document of its own."""

    @property
    def longest(self) -> int:
        """The number of tokens of the longest answer with its prompt. A packed row must hold them."""
        return max(len(answer.tokens) for answer in self.answers)

    def cut(self, limit: int) -> "Alternatives":
        """Each answer with its prompt, cut to `limit` tokens."""
        return replace(self, answers=[answer.cut(limit) for answer in self.answers])

    def pieces(self, limit: int) -> list[Self]:
        """The answers in order, in as few documents of at most `limit` tokens as possible, each with the prompt."""
        assert self.longest <= limit
        groups: list[list[Example]] = []
        room = 0
        for answer in self.answers:
            more = len(answer.tokens) - self.shared
            if not groups or not self.shared or more > room:
                groups.append([])
                room = limit - self.shared
            groups[-1].append(answer)
            room -= more
        return [replace(self, answers=group) for group in groups]


def read(row: Row, data: Data) -> ReadRow:
    prompt, answers = (field_of(row, name, data) for name in ("prompt", "answers"))
    if not isinstance(answers, list) or not answers:
        raise DataError("answers: this is no list with at least one answer")
    if not isinstance(prompt, list):
        text, texts = text_of(prompt, "prompt"), [text_of(answer, "answers") for answer in answers]
        turns = [Turn("user", text), *(Turn("assistant", answer) for answer in texts)]
        return ReadRow([{"prompt": text, "completion": answer} for answer in texts], turns)
    before, tools = [untrained(message) for message in messages_of(prompt, "prompt")], tools_of(row, data)
    talks = [_messages(answer) for answer in answers]
    spoken = [*before, *(message for talk in talks for message in talk)]
    return ReadRow([{"messages": [*before, *talk], "tools": tools} for talk in talks], turns_of(spoken))


def _messages(answer: Any) -> list[Row]:
    """An answer to a conversation: its messages, or the text of a single message."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else messages_of(answer, "answers")


def documents(rows: list[Encoded], data: Data) -> list[Alternatives | DataError]:
    return [_together(answers, data) for _, answers in rows]


def _together(answers: list[Example | DataError], data: Data) -> Alternatives | DataError:
    """Alternatives that share the tokens before the first trained one, if these are the same in all of them."""
    for number, answer in enumerate(answers, 1):
        if isinstance(answer, DataError):
            return DataError(f"answer {number}: {answer}")
    found = [answer for answer in answers if isinstance(answer, Example)]
    teaching = [answer for answer in found if answer.teaches] or found
    if not (data.share_prefix and len(teaching) > 1):
        return Alternatives(teaching)
    first = teaching[0].tokens[: prompt_tokens(teaching[0])]
    alike = [np.array_equal(answer.tokens[: prompt_tokens(answer)], first) for answer in teaching]
    if not all(alike):
        return DataError(
            f"the prompt is not the same tokens before answer {alike.index(False) + 1} and before the first one: a"
            " token reaches across its end; end a prompt of text with white space"
        )
    return Alternatives(teaching, shared_tokens(teaching[0]))
