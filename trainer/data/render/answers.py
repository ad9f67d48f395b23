"""Encodes answers to prompts, of messages or of strings, which formats with one or two answers a row have in common."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trainer.config import Data
from trainer.data.format.messages import Message, read_messages
from trainer.data.render.chat import Example, Renderer
from trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerRenderer:
    """Encodes rows that are either of the format chat or of prompt_completion, with the chat template or without."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: Data) -> None:
        self._tokenizer, self._data = tokenizer, data

    @cached_property
    def _messages(self) -> Renderer:
        settings = {"format": "chat", "loss_on": "assistant", "fields": {}}
        return Renderer(self._tokenizer, self._data.model_copy(update=settings))

    @cached_property
    def _texts(self) -> Renderer:
        settings = {"format": "prompt_completion", "loss_on": "completion", "fields": {}, "template": None}
        return Renderer(self._tokenizer, self._data.model_copy(update=settings))

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Example | DataError]:
        """Each row's tokens and targets, or what is wrong with it; a row with `messages` is a conversation.

        Raises:
            ConfigError: the tokenizer cannot serve rows of messages, or of strings, as `chat.Renderer` says.
        """
        found: dict[int, Example | DataError] = {}
        for in_messages in (True, False):
            mine = [number for number, row in enumerate(rows) if ("messages" in row) == in_messages]
            if mine:
                renderer = self._messages if in_messages else self._texts
                found |= zip(mine, renderer.encode([rows[number] for number in mine]), strict=True)
        return [found[number] for number in range(len(rows))]


def messages_of(given: Any, name: str) -> list[Message]:
    """The messages in the field `name`. Raises `DataError` where there is no conversation."""
    try:
        return read_messages(given)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
