"""The chat template of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import Data
from trainer.data.chat_template import ChatTemplate
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def conversation_template(tokenizer: "PreTrainedTokenizerBase", data: Data) -> ChatTemplate:
    """The template that the run's conversations are rendered by. Raises `ConfigError` as `chat_template`."""
    return ChatTemplate(tokenizer, chat_template(tokenizer, data))


def chat_template(tokenizer: "PreTrainedTokenizerBase", data: Data) -> str:
    """The text of the run's chat template.

    Raises:
        ConfigError: there is none, or its file cannot be read.
    """
    own = template_text(data)
    if own is not None:
        return own
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            "data.template: not set, and the tokenizer of model.base has no chat template. Set it to a Jinja chat "
            "template file, or data.format to prompt_completion or text."
        ) from error


def template_text(data: Data) -> str | None:
    """The chat template that replaces the tokenizer's own, or None.

    Raises:
        ConfigError: the file cannot be read.
    """
    if data.template is None:
        return None
    try:
        return Path(data.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.template: {data.template!r} cannot be read: {error}.") from error
