"""The chat template of a run."""

from pathlib import Path

from trainer.config import Data
from trainer.errors import ConfigError


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
