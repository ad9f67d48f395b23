"""The size of a tokenizer, from its own files: other people's, which are checked before they are used."""

import json
from pathlib import Path
from typing import Any

from trainer.base.unreadable import unreadable
from trainer.errors import NOT_JSON, ConfigError


def tokenizer_size(directory: Path, name: str) -> int:
    """One more than the largest token id, from the tokenizer's own files.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    if (directory / "tokenizer.json").is_file():
        try:
            return _largest_id(json.loads((directory / "tokenizer.json").read_bytes())) + 1
        except (OSError, *NOT_JSON, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(unreadable(name, "tokenizer.json", error)) from error
    if (directory / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).vocab_size()
        except (OSError, RuntimeError) as error:
            raise ConfigError(unreadable(name, "tokenizer.model", error)) from error
    raise ConfigError(
        f"model.base: {name} has neither tokenizer.json nor tokenizer.model. Copy the tokenizer's files there."
    )


def _largest_id(tokenizer: dict[str, Any]) -> int:
    vocabulary = tokenizer["model"]["vocab"]
    ids = [len(vocabulary) - 1, *(token["id"] for token in tokenizer.get("added_tokens", []))]
    if not isinstance(vocabulary, list):
        ids += vocabulary.values()
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError("its vocabulary is empty, or has ids that are no whole numbers")
    return max(ids)
